"""What a row's words say of its picture that a changed copy of the picture would make untrue.

Words decide, and not understanding: "what is left of it" counts as a side. A copy too few costs little, a copy whose
answer is wrong teaches it. Not covered: languages without words in the lists, and texts that name a picture's writing
in lower case and without saying so ("bus stop" of a sign).
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

# Regular expressions for whole words, of case-folded texts, in the languages that data commonly has: English, German,
# Dutch, French, Spanish, Portuguese, Italian, Polish, Russian, and sides in some more; then signs of those without
# spaces between words
_SIDES = (
    r"(?:top|bottom|upper|lower|mid|cent(?:er|re))?-?(?:left|right)\w*|east\w*|west\w*|(?:anti|counter)?-?"
    r"clockwise|port ?side|starboard|(?:north|south)-?(?:east|west)\w*|(?:driver'?s?|passenger'?s?|near|off) ?-?side|"
    r"mirror\w*|[a-z]-shaped|[lr] (?:hand|foot|arm|leg|eye|ear|cheek|side|knee|shoulder|hip|lung|breast|kidney)s?|"
    r"l/r|r/l|links\w*|linke\w*|rechts\w*|rechte[nmrs]?\w*|gauches?|droite?s?|izquierd[oa]s?|derech[oa]s?|"
    r"esquerd[oa]s?|direit[oa]s?|sinistr[oaie]|destr[oaie]|lew(?:o|a|y|ej|ym)|praw(?:o|a|y|ej|ym)|лев\w+|прав\w+|слева|справа|налево|"
    r"направо|влево|вправо|vänst\w+|höger\w*|venstre|højre|høyre|vasem\w+|vasen|oike\w+|vlevo|vpravo|lev(?:ý|á|é)\w*|"
    r"prav(?:ý|á|é)\w*|bal(?:ra|oldal\w*)|jobb\w*|αριστερ\w+|δεξι\w+|bên (?:trái|phải)|"
    r"sol (?:taraf|el|yan)\w*|sağ(?:da|dan|a)?",
    "左右왼오←→↖↗↘↙⇐⇒⬅➡👈👉◀▶⬉⬈⬊⬋",
    r"오른|좌측|우측|يسار|يمين|ايسر|ايمن|اليسر|اليمن|बाए|बाएँ|बायाँ|बायां|दाए|दायाँ|दायां",
)
_PLACES = (
    r"tops?|bottoms?|upper\w*|lower\w*|corners?|edges?|borders?|margins?|middle|cent(?:er|re)s?|cent(?:ered|red|ral)|"
    r"oben|unten|ober\w*|unter\w*|ecken?|rand|rände\w*|mitte|haut|bas|coins?|bords?|milieu|arriba|abajo|esquinas?|"
    r"bordes?|centro|superior\w*|inferior\w*",
    "",
    r"上方|下方|上部|下部|顶部|底部|角落|边缘|中央|中间|真ん中|隅",
)
_COUNTS = (
    r"how many|counts?|counting|number of|two|three|four|five|six|seven|eight|nine|ten|dozens?|\d+ [^\W\d]\w*|"
    r"wie viele|anzahl|zwei|drei|vier|combien|deux|trois|cu[aá]nt[oa]s|quant[oaie]s?|dos|tres",
    "",
    r"多少|几个|いくつ|何個|両|两个|三个",
)
_WRITING = (
    r"texts?|letters?|lettering|written|writings?|handwrit\w*|reads?|says?|saying|spell(?:s|ed|ing)?|signs?|signboards?|"
    r"inscri\w+|logos?|plates?|numbers?|digits?|numerals?|clocks?|ocr|transcri\w+|schrift\w*|buchstabe\w*|"
    r"geschrieben\w*|schild\w*|zahl(?:en)?|texte?s?|lettres?|[eé]crit\w*|textos?|letras?|escrit[oa]s?|n[uú]mero\w*|"
    r"testo|scritt[oa]\w*|текст\w*|надпис\w*|написан\w*|букв\w*",
    "字写書文",
    r"#\s*\d|№\s*\d|\d{3,}|\d[:/-]\d|[^\W\d]\d|\d[^\W\d]",
)
_BOXES = (
    r"bbox\w*|bounding|coordinates?|polygons?|key ?points?",
    "",
    r"<(?:box|loc|quad|ref|point)\w*|\b[xy]\s*[=:]\s*-?\d|\d\s*[,;]\s*-?\d|\d\.\d|[\[({<]\s*-?\d",
)
_COLORS = (
    r"(?:red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|gr[ae]y)(?:s|ish|er|ed)?|redd\w+|bluish|"
    r"beige|turquoise|cyan|magenta|gold(?:en)?|silver\w*|crimson|maroon|navy|teal|olive|lavender|scarlet|colou?r\w*|"
    r"hues?|bright\w*|dark\w*|light(?:er|est|ness|ing)?|pale\w*|vivid\w*|saturat\w*|contrast\w*|dim(?:ly)?|faded|"
    r"shad(?:e|ed|es|ow|ows|y)|tint\w*|monochrom\w*|night\w*|rote?[nmrs]?|gelb\w*|grün\w*|blau\w*|lila|rosa|braun\w*|"
    r"schwarz\w*|weiss\w*|grau\w*|helle?[nmrs]?|dunk[el]\w*|farb\w*|farbe\w*|rouges?|jaunes?|verte?s?|bleu\w*|rose?s?|"
    r"marron|noire?s?|blanch?e?s?|gris\w*|clair\w*|sombres?|couleurs?|roj[oa]s?|amarill[oa]s?|verdes?|azul\w*|"
    r"morad[oa]s?|negr[oa]s?|blanc[oa]s?|clar[oa]s?|oscur[oa]s?|красн\w+|ж[её]лт\w+|зел[её]н\w+|син\w+|черн\w+|бел\w+",
    "红紅赤橙黄黃绿緑綠蓝藍青紫粉棕褐黑黒白灰色亮暗",
    r"빨간|파란|노란|초록|검은|흰",
)
Words = tuple[str, str, str]  # whole words, single signs, and what may be anywhere
# operation -> what its copies may make untrue, by the name that the count has
_CHANGED_BY: dict[str, dict[str, Words]] = {
    "flip": {"side": _SIDES, "box": _BOXES, "text": _WRITING},
    "crop": {"side": _SIDES, "place": _PLACES, "box": _BOXES, "text": _WRITING, "count": _COUNTS},
    "color": {"color": _COLORS},
}
_QUOTED = re.compile(r"""["“”„«»「」『』]|(?<!\w)'[^'\n]+'(?!\w)""")
_NO_WORD = re.compile(r"[\W_]*\d[\W\d_]*")  # nothing but numbers
MIN_CAPITALS = 3  # letters of a word in capitals, as signs are read out


def described(texts: Sequence[str], operation: str) -> str | None:
    """What the texts of a row name that an operation changes, such as "side" or "text"; or None.

    Args:
        texts: Question, answer and label of a row.
        operation: One of `spec.AUGMENTATIONS`.
    """
    plain = [unicodedata.normalize("NFKC", text).replace("_", " ") for text in texts]
    for what, words in _CHANGED_BY[operation].items():
        if any(_pattern(words).search(text.casefold()) for text in plain):
            return what
        if what == "text" and any(map(_reads_out, plain)):
            return what
    return None


def _reads_out(text: str) -> bool:
    """Whether a text quotes, is a number, or holds a word in capitals."""
    capitals = any(len(word) >= MIN_CAPITALS and word.isupper() for word in re.findall(r"[^\W\d_]+", text))
    return capitals or _QUOTED.search(text) is not None or _NO_WORD.fullmatch(text) is not None


@cache
def _pattern(words: Words) -> re.Pattern[str]:
    whole, signs, anywhere = words
    parts = [rf"\b(?:{whole})\b", f"[{signs}]" if signs else "", anywhere]
    return re.compile("|".join(part for part in parts if part))

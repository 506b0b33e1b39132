"""`mllm-assets serve` in a process of its own, asked by OpenAI's own client."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from mllm_assets.errors import ModelError
from mllm_assets.inference.answerer import Answerer
from mllm_assets.inference.generate import generate
from mllm_assets.recipe.asking import Sampling
from mllm_assets.training.runs.models import NamedModel
from tests.integration.model_server import KEY, MODEL, Server, data_url, question

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
from mllm_assets.inference.chat_request import require_same_format  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.slow]
IMAGE = MODEL.parent / "data" / "images" / "emoji_000.png"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--max-new-tokens", "12")
    yield server
    server.process.kill()
    server.process.communicate()


def test_the_answer_is_the_one_that_generate_gives_streamed_or_not(server: Server, tmp_path: Path) -> None:
    """The turn format, the shrinking of large images, the end of the turn and greedy decoding are the training's."""
    buffer = io.BytesIO()
    Image.open(IMAGE).resize((1500, 900)).save(buffer, "PNG")
    for image in (IMAGE.read_bytes(), buffer.getvalue()):
        file = tmp_path / "image.png"
        file.write_bytes(image)
        expected = generate(
            NamedModel(name="m", directory=MODEL), [file], "What is this?", Sampling(max_new_tokens=12), device="cpu"
        ).text
        asked = {"model": server.model, "messages": question("What is this?", data_url(image)), "temperature": 0}
        whole = server.client().chat.completions.create(**asked)
        assert whole.choices[0].message.content.strip() == expected and whole.model == server.model
        chunks = list(server.client().chat.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == expected
        assert chunks[-1].choices[0].finish_reason in ("stop", "length") and chunks[-1].usage.completion_tokens <= 12


def test_sampling_and_a_system_text_count(server: Server) -> None:
    def said(messages: list[Any], **options: Any) -> str:
        answer = server.client().chat.completions.create(model=server.model, messages=messages, **options)
        return answer.choices[0].message.content

    plain = question("What is this?", data_url(IMAGE))
    assert said(plain, temperature=5.0, seed=1) == said(plain, temperature=5.0, seed=1) != said(plain, temperature=0)
    assert said([{"role": "system", "content": "Be brief."}, *plain], temperature=0) != said(plain, temperature=0)


def test_without_the_key_nothing_is_told(server: Server) -> None:
    for key in ("another-key-of-some-length", ""):
        answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        assert answer.status_code == 401 and KEY not in answer.text
    with pytest.raises(openai.AuthenticationError, match="Wrong or missing API key"):
        server.client("another-key-of-some-length").chat.completions.create(model="m", messages=question("What?"))


def test_there_is_one_model_and_no_other_address(server: Server) -> None:
    [model] = server.client().models.list()
    assert model.id == server.model and model.created == int(MODEL.stat().st_mtime)
    with pytest.raises(openai.NotFoundError, match="has the model .* alone, no 'google/gemma-3-4b-it'"):
        server.client().chat.completions.create(model="google/gemma-3-4b-it", messages=question("What?"))
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/systemone", "/docs", "/openapi.json"):
        for method in ("GET", "POST"):
            assert httpx.request(method, server.url + path, headers=headers, json={}).status_code == 404, path
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (question("What?", "http://127.0.0.1:1/picture.png"), "This server fetches no address and opens no file"),
        (question("What?", str(IMAGE)), "This server fetches no address and opens no file"),
        (question("What?", f"file://{IMAGE}"), "This server fetches no address and opens no file"),
        (
            question("What?", "data:image/png;base64,aGVsbG8="),
            "the image cannot be used: it is not a picture that can be read",
        ),
        (question("What<start_of_image>?"), "the text holds '<start_of_image>', which steers the model"),
        ([], "messages must be a list of at least one message"),
        ([{"role": "tool", "content": "x"}], "messages[0]: role must be one of system, user, assistant"),
        ([{"role": "assistant", "content": "x"}], "The messages do not fit the model's turn format"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(server: Server, messages: list[Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        server.client().chat.completions.create(model=server.model, messages=messages)
    assert message in str(raised.value)


def test_a_client_cannot_bring_its_own_template(server: Server) -> None:
    extra = {"chat_template_kwargs": {"chat_template": "{{ messages }}"}}
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs is not supported by this server"):
        server.client().chat.completions.create(model=server.model, messages=question("?"), extra_body=extra)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stop", 5, "stop: Input should be a valid string or Input should be a valid list."),
        ("stop", [""], "stop: Input should be a valid string or String should have at least 1 character."),
        ("temperature", "warm", "temperature: Input should be a valid number."),
        ("temperature", -1, "temperature: Input should be greater than or equal to 0."),
        ("top_p", 0, "top_p: Input should be greater than 0."),
        ("max_tokens", -5, "max_tokens: Input should be greater than or equal to 1."),
        ("max_completion_tokens", "many", "max_completion_tokens: Input should be a valid integer."),
        ("seed", 10**30, "seed: Input should be"),
        ("seed", "x", "seed: Input should be a valid integer."),
        ("frequency_penalty", -2, "frequency_penalty: Input should be greater than or equal to 0."),
        ("logit_bias", {"one": 1}, "logit_bias: String should match pattern"),
        ("logit_bias", {"99999999": 1}, "logit_bias: the model has"),
        ("n", 2, "n: Input should be 1."),
        ("stream", "yes", "stream: Input should be a valid boolean."),
        ("model", 7, "model: Input should be a valid string."),
        ("response_format", {"type": "json_object"}, "response_format: Input should be 'text'."),
        ("tools", [], "tools is not supported by this server. Leave it out."),
        ("colour", "red", "colour is not supported by this server. Leave it out."),
    ],
)
def test_a_field_that_cannot_be_used_is_named(server: Server, field: str, value: Any, message: str) -> None:
    """Each was answered with 500, or did something else than what was asked."""
    asked = {"model": server.model, "messages": question("What?"), "extra_body": {field: value}}
    with pytest.raises(openai.BadRequestError) as raised:
        server.client().chat.completions.create(**asked)
    assert raised.value.param == field and message in raised.value.body["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"null", b"7", b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused_as_json(server: Server, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", headers=headers, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error" and answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["messages", "stop"])
def test_half_a_character_that_would_steer_an_answer_is_refused(server: Server, field: str) -> None:
    """A lone surrogate in a prompt was answered with 500."""
    half = r'"\ud800"'
    values = {"messages": '[{"role": "user", "content": "?"}]', "model": json.dumps(server.model)}
    values[field] = f'[{{"role": "user", "content": {half}}}]' if field == "messages" else half
    body = "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}"
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", headers=headers, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_fields_that_change_no_answer_are_accepted(server: Server) -> None:
    harmless = {"n": 1, "user": "me", "presence_penalty": 0.0, "response_format": {"type": "text"}, "tools": None}
    asked = {"model": server.model, "messages": question("What?"), "max_tokens": 2, "logit_bias": {"300": -100}}
    assert server.client().chat.completions.create(**asked, extra_body=harmless).usage.completion_tokens <= 2


def test_an_answer_ends_before_a_stop_text_streamed_or_not(server: Server) -> None:
    asked = {"model": server.model, "messages": question("What is this?", data_url(IMAGE)), "temperature": 0}
    create = server.client().chat.completions.create
    whole = create(**asked)
    text = whole.choices[0].message.content
    for stop in (text[4:7], ["never said", text[len(text) // 2 :][:4]]):
        expected = text[: text.index(stop if isinstance(stop, str) else stop[-1])]
        stopped = create(**asked, stop=stop)
        assert stopped.choices[0].message.content == expected and stopped.choices[0].finish_reason == "stop"
        assert stopped.usage.completion_tokens < whole.usage.completion_tokens
        chunks = list(create(**asked, stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stream_ends_as_openai_ends_it(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"messages": question("What?"), "stream": True, "max_tokens": 2}
    answer = httpx.post(f"{server.url}/v1/chat/completions", headers=headers, json=body, timeout=500)
    assert answer.text.endswith("}\n\ndata: [DONE]\n\n") and answer.text.count("[DONE]") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_refused_with_both_lengths(server: Server, stream: bool) -> None:
    asked = {"model": server.model, "messages": question("word " * 9000, data_url(IMAGE)), "stream": stream}
    with pytest.raises(openai.BadRequestError, match=r"The prompt has [\d,]+ tokens.* context holds 8,192 with the"):
        server.client().chat.completions.create(**asked)


def test_an_image_too_large_to_decode_is_refused(server: Server) -> None:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(buffer, "PNG")
    with pytest.raises(openai.BadRequestError, match="cannot be used: it has 10000 x 9000 pixels, expected at"):
        server.client().chat.completions.create(model=server.model, messages=question("?", data_url(buffer.getvalue())))


def test_a_name_that_points_to_this_machine_reaches_nothing_with_the_key_either(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{server.url}/v1/models", headers={**headers, "Host": "evil.example"}).status_code == 400
    port = server.url.rpartition(":")[2]
    for name in (f"localhost:{port}", f"[::1]:{port}"):
        assert httpx.get(f"{server.url}/v1/models", headers={**headers, "Host": name}).status_code == 200


def test_ctrl_c_in_the_middle_of_an_answer_leaves_no_process() -> None:
    """Without a key, as on one's own machine; then a page in a browser must not reach it under another name."""
    server = Server("--max-new-tokens", "100000", "--no-auth", key=None)
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}).status_code == 400
    asked = {"model": server.model, "messages": question("What?", data_url(IMAGE))}
    stream = server.client("x").chat.completions.create(**asked, stream=True, temperature=20.0)
    next(iter(stream))
    tree = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert server.stop().strip().endswith("stopped") and server.process.returncode == 0
    assert not [process for process in tree if process.is_running()]


def test_a_chat_template_of_another_format_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    template = directory / "chat_template.jinja"
    answerer = Answerer(directory)
    require_same_format(answerer.encoder, answerer.processor, str(directory))
    template.write_text(template.read_text().replace("<end_of_turn>", ""))
    answerer = Answerer(directory)
    with pytest.raises(ModelError, match=r"in a question, from token 35 on, expected 'e\?<end_of_turn>"):
        require_same_format(answerer.encoder, answerer.processor, str(directory))

"""Attention inside packed rows and not across them, for Gemma 3.

transformers 5.23 finds packed rows by their positions, but looks image blocks up at a token's place in its row, not in
the sequence: in sliding layers tokens of the second row then see ahead where the first row has its image. So the masks
are made here. Rules: `create_masks_for_vision_model` of `models/gemma3/modeling_gemma3.py`.

Shape suffixes: B sequences, T tokens.
"""

import torch


def separate_rows(
    position_ids_BT: torch.Tensor, token_type_ids_BT: torch.Tensor, sliding_window: int
) -> dict[str, torch.Tensor]:
    """Return the masks of Gemma 3's two kinds of layers, (B, 1, T, T), true where a token is seen.

    Args:
        position_ids_BT: 0 at the first token of each row; padding, all 0, is rows of one token.
        token_type_ids_BT: 1 at image tokens, which see the whole of their image.
        sliding_window: How far back sliding layers see.
    """
    row_BT = (position_ids_BT == 0).cumsum(-1)
    is_image_BT = token_type_ids_BT == 1
    begins_BT = is_image_BT & ~torch.nn.functional.pad(is_image_BT, (1, 0))[:, :-1]
    image_BT = torch.where(is_image_BT, begins_BT.cumsum(-1), 0)
    same_row = row_BT[:, :, None] == row_BT[:, None, :]
    same_image = (image_BT[:, :, None] == image_BT[:, None, :]) & is_image_BT[:, :, None]
    places = torch.arange(row_BT.shape[1], device=row_BT.device)
    distance = places[:, None] - places[None, :]
    seen = (same_row & ((distance >= 0) | same_image))[:, None]
    return {"full_attention": seen, "sliding_attention": seen & (distance < sliding_window)}

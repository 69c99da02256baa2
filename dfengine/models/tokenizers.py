"""The tokens of a prompt, and the check that a tokenizer can represent it completely."""

from __future__ import annotations

from typing import Any

import dfengine.checks as checks
from dfengine.tokens import PADDING, Tokens


def tokens_of(pipeline: Any, tokenizer: Any, prompt: str) -> Tokens:
    """The tokens of a prompt. All vectors of a textual inversion have the span of the word they replace."""
    expanded = pipeline.maybe_convert_prompt(prompt, tokenizer)
    encoded = tokenizer(expanded, return_offsets_mapping=True, verbose=False)
    added_vocabulary = set(tokenizer.get_added_vocab())
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    shift = 0  # characters that the expansion has inserted so far
    for token_id, (start, stop) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        text = expanded[start:stop]
        base, underscore, index = text.rpartition("_")  # the vectors of "<cat>" are <cat>, <cat>_1, <cat>_2 …
        is_further_vector = bool(underscore) and index.isdecimal() and {base, text} <= added_vocabulary
        if is_further_vector:
            shift += stop - start + 1
            spans.append(spans[-1])
        else:
            spans.append((start - shift, stop - shift) if text else (0, 0))
        texts.append(text or tokenizer.convert_ids_to_tokens(token_id))
    if len(texts) < tokenizer.model_max_length:
        texts.append(PADDING)
        spans.append((0, 0))
    return Tokens(prompt, tuple(texts), tuple(spans))


def check_prompt(tokenizer: Any, prompt: str) -> None:
    """Raise ValueError for a prompt that is too long, no text, or contains a word outside a closed vocabulary."""
    checks.text("prompt", prompt)
    vocabulary = tokenizer.init_kwargs.get("words")
    if vocabulary:
        unknown = list(dict.fromkeys(word for word in prompt.lower().split() if word not in vocabulary))
        if unknown:
            raise ValueError(
                f"the model does not know {', '.join(map(repr, unknown))}; its words are: {' '.join(vocabulary)}"
            )
    tokens = tokenizer(prompt, truncation=False, return_offsets_mapping=True, verbose=False)
    limit = tokenizer.model_max_length
    if len(tokens.input_ids) > limit:
        # The last position is the end-of-text token's.
        excess = prompt[tokens.offset_mapping[limit - 1][0] :]
        raise ValueError(
            f"the prompt has {len(tokens.input_ids) - 2} tokens and the model takes {limit - 2}: "
            f"{excess!r} would be cut; shorten it"
        )

"""The tokens of a prompt, and prompts that a tokenizer cannot take whole."""

from __future__ import annotations

from typing import Any

from dfengine.tokens import PADDING, Tokens


def tokens_of(pipeline: Any, tokenizer: Any, prompt: str) -> Tokens:
    """The tokens of a prompt; those of a textual inversion of several vectors all stand for the word they replace."""
    read = pipeline.maybe_convert_prompt(prompt, tokenizer)
    encoded = tokenizer(read, return_offsets_mapping=True, verbose=False)
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    added = 0
    for number, (start, stop) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        text = read[start:stop]
        base, underscore, index = text.rpartition("_")
        is_added = bool(underscore) and index.isdecimal() and {base, text} <= set(tokenizer.get_added_vocab())
        added += (stop - start + 1) * is_added
        spans.append(spans[-1] if is_added else (start - added, stop - added) if text else (0, 0))
        texts.append(text or tokenizer.convert_ids_to_tokens(number))
    if len(texts) < tokenizer.model_max_length:
        texts.append(PADDING)
        spans.append((0, 0))
    return Tokens(prompt, tuple(texts), tuple(spans))


def check_prompt(tokenizer: Any, prompt: str) -> None:
    """Raise ValueError for a prompt that is too long, or has a word outside a closed vocabulary."""
    vocabulary = tokenizer.init_kwargs.get("words")
    if vocabulary:
        unknown = [word for word in prompt.lower().split() if word not in vocabulary]
        if unknown:
            raise ValueError(
                f"the model does not know {', '.join(map(repr, unknown))}; its words are: {' '.join(vocabulary)}"
            )
    tokens = tokenizer(prompt, truncation=False, return_offsets_mapping=True, verbose=False)
    limit = tokenizer.model_max_length
    if len(tokens.input_ids) > limit:
        # The last of the tokens that fit is the end-of-text token.
        cut = prompt[tokens.offset_mapping[limit - 1][0] :]
        raise ValueError(
            f"the prompt has {len(tokens.input_ids) - 2} tokens and the model takes {limit - 2}: "
            f"{cut!r} would be cut; shorten it"
        )

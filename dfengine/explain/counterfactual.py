"""Counterfactual maps: what each word of the prompt changes in the prediction, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfengine.checks import one_of
from dfengine.diffusion.denoiser import Condition, Denoiser, HasTokens, require
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import Explainer, OutputSpec, StepMap, option
from dfengine.explain.edits import Edit, Replacements
from dfengine.explain.registry import register
from dfengine.runtime.batching import AsyncHostCopy, in_batches
from dfengine.tokens import concept_spans, remove

#: The ways to edit a prompt, and what then happens to the word.
EDITS = {"auto": "replaced or removed", "replace": "replaced", "remove": "removed", "zero": "zeroed in its encoding"}
#: What is compared, in words.
OUTPUTS = {"epsilon": "the predicted noise", "x0": "the predicted image"}
#: Each is a forward a step.
_MAX_REPLACEMENTS = 1000
#: Words of a prompt, for estimates without one.
_NUM_WORDS = 12


def _hot(explainer: Counterfactual) -> str:
    edit, output = EDITS[explainer.edit], OUTPUTS[explainer.output]
    return f"here {output} changes when the word is {edit}; for the whole prompt, against the negative one."


@register("counterfactual", label="counterfactual", form="words", hot=_hot)
@dataclass(frozen=True)
class Counterfactual(Explainer):
    """What each word of the prompt changes, and where: ‖f(R_t | prompt) − f(R_t | edited prompt)‖ over the channels.

    In the edited prompt another word of its kind takes its place, or none. Of several replacements the mean is the map,
    and their standard error the error. The saliency is what the whole prompt changes, against the negative prompt.
    """

    words: Sequence[str] | None = option(None, "words or phrases of the prompt to map; every word by default")
    edit: str = option("auto", "auto (replace if replacements are known, otherwise remove), replace, remove or zero")
    replace: Mapping[str, Sequence[str]] | None = option(None, "what to put in place of a word or phrase")
    num_replacements: int = option(4, "replacements of a word, at most, that come with the model")
    output: str = option("epsilon", "prediction to compare: epsilon or x0")
    name: str = option("counterfactual", "name that the maps are stored under")

    def __post_init__(self) -> None:
        """Raises ValueError for an empty list of words, and settings that are not known, out of range or unused."""
        super().__post_init__()
        if self.words is not None:
            object.__setattr__(self, "words", tuple(dict.fromkeys(self.words)))
            if not self.words:
                raise ValueError("counterfactual needs at least one word: name some, or leave words out for all")
        one_of("edit", self.edit, EDITS)
        one_of("output", self.output, OUTPUTS)
        if not 1 <= self.num_replacements <= _MAX_REPLACEMENTS:
            raise ValueError(
                f"num_replacements {self.num_replacements} is not possible: expected 1 to {_MAX_REPLACEMENTS}"
            )
        for word, others in (self.replace or {}).items():
            if not others or not all(text.strip() for text in (word, *others)):
                raise ValueError(f"replace {word!r} by {list(others)} is not possible: expected at least one word")
        if self.replace and not self._replaces:
            raise ValueError(f"replace has no effect with edit={self.edit!r}: leave one of them out")

    @property
    def _replaces(self) -> bool:
        return self.edit in ("auto", "replace")

    def num_forwards(self, num_steps: int) -> int:
        """For a dozen words where they are not named; `output_spec` knows how many a prompt has."""
        num_edits = 1
        if self._replaces:
            num_edits = max([self.num_replacements, *map(len, (self.replace or {}).values())])
        return (2 + num_edits * (_NUM_WORDS if self.words is None else len(self.words))) * num_steps

    def concepts(self, prompt: str) -> Sequence[str] | None:
        """The words and phrases of a prompt to map; None for each of its words."""
        return self.words

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """The words. Raises ValueError for one that is not in the prompt or has no replacement though it needs one.

        Also if the model takes no prompts or not an edited one, or is told the same by it.
        """
        edits = self.edits(denoiser, job.prompt)
        prompt = denoiser.condition([job])
        edited = _Edited(denoiser, job, prompt, edits)
        for edit, rows in zip(edits, edited.rows, strict=True):
            if any(_is_equal(edited.condition, row, prompt) for row in rows):
                raise ValueError(
                    f"{denoiser.name} is told the same without {edit.concept!r}: use a model that takes prompts, or "
                    "give another replacement"
                )
        return OutputSpec(
            words=[edit.concept for edit in edits],
            has_word_errors=self._has_errors(denoiser),
            num_forwards=2 + len(edited.condition),
        )

    def _has_errors(self, denoiser: Denoiser) -> bool:
        return self._replaces and bool(self.replace or denoiser.alternatives)

    def edits(self, denoiser: Denoiser, prompt: str) -> list[Edit]:
        """How a prompt is edited for each of its words. Raises ValueError as `output_spec` does."""
        chosen, edits = self.concepts(prompt), []
        alternatives = denoiser.alternatives if self._replaces else {}
        replacements = Replacements(prompt, self.replace or {}, alternatives, self.num_replacements)
        for concept, spans in concept_spans(prompt, chosen):
            prompts = replacements.prompts(spans)
            if not prompts and self.edit == "replace":
                if chosen is None:  # words of no kind, such as articles
                    continue
                raise ValueError(
                    f"there is no replacement for {concept!r}: give some, as in replace={{{concept!r}: [...]}}, or use "
                    "edit='auto', which then removes it"
                )
            if not prompts and self.edit != "zero":
                prompts = [remove(prompt, spans)]
            if prompt in prompts:
                raise ValueError(f"{concept!r} is its own replacement, which changes nothing: give another one")
            edits.append(Edit(concept, spans, prompts))
        if unused := replacements.unused():
            raise ValueError(f"replace {unused[0]!r} has no effect: it is not among the words to map")
        if self.edit == "replace" and not edits:
            raise ValueError(f"there is no replacement for any word of {prompt!r}: give some, or use edit='auto'")
        return edits

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Batches fill across words, replacements, steps and items."""
        group: list[_Item] = []
        for number, path in enumerate(trajectories):
            edits = self.edits(denoiser, path.job.prompt)
            edited = _Edited(denoiser, path.job, path.prompt, edits)
            group.append(
                _Item(number, path, Condition.cat([path.prompt, path.negative, edited.condition]), edited.rows)
            )
            # A network prepares every condition: no more at once than its batches can fill with.
            if number == len(trajectories) - 1 or sum(len(item.conditions) for item in group) >= denoiser.batch_size:
                yield from self._explain(denoiser, group, done)
                group = []

    def _explain(
        self, denoiser: Denoiser, items: Sequence[_Item], done: Collection[tuple[int, int]]
    ) -> Iterator[StepMap]:
        forwards = _Forwards(denoiser, items, self.output)
        is_pending = [(item.number, step) not in done for item, step in forwards.rows]
        if not any(is_pending):
            return
        for row, changes in forwards.changes(is_pending):
            item, step = forwards.rows[row]
            by_word = [changes[[1 + edit for edit in edits]] for edits in item.edits]
            maps = torch.stack([one.mean(0) for one in by_word]) if by_word else None
            errors = torch.stack([_standard_error(one) for one in by_word]) if by_word else None
            errors = errors if self._has_errors(denoiser) else None
            yield StepMap(item.number, step, self.name, changes[0], word_maps=maps, word_errors=errors)


class _Edited:
    """The condition of every distinct edit of a job's prompt, and the rows of it that belong to each word."""

    def __init__(self, denoiser: Denoiser, job: Job, prompt: Condition, edits: Sequence[Edit]) -> None:
        self.rows: list[list[int]]
        if edits and not any(edit.prompts for edit in edits):
            encoder = require(denoiser, HasTokens, "setting the encoding of words to zero")
            tokens = encoder.tokens(job.prompt)
            places = [sorted({at for span in edit.spans for at in tokens.places(*span)}) for edit in edits]
            self.condition = Condition.cat([encoder.zero_tokens(prompt, at) for at in places])
            self.rows = [[row] for row in range(len(edits))]
            return
        texts = list(dict.fromkeys(text for edit in edits for text in edit.prompts))
        # Nothing is left where all of a prompt is removed, which a job can have as its negative prompt alone.
        full = [dataclasses.replace(job, prompt=text) for text in texts if text]
        parts = [denoiser.condition(full)] if full else []
        if "" in texts:
            parts.append(denoiser.condition([dataclasses.replace(job, negative_prompt="")], negative=True))
        texts.sort(key=lambda text: text == "")
        self.condition = Condition.cat(parts) if parts else prompt[:0]
        self.rows = [[texts.index(text) for text in edit.prompts] for edit in edits]


@dataclass(frozen=True)
class _Item:
    """A trajectory and all that its steps are predicted under."""

    number: int
    path: Trajectory
    conditions: Condition
    """the prompt, the negative prompt, and the edits"""
    edits: Sequence[Sequence[int]]
    """the edits of each word"""


class _Forwards:
    """The predictions of some items' steps, each a row, under all conditions of the item."""

    def __init__(self, denoiser: Denoiser, items: Sequence[_Item], output: str) -> None:
        self.denoiser, self.output, device = denoiser, output, denoiser.device
        self.rows = [(item, step) for item in items for step in item.path.steps]
        #: Every row with all conditions but the prompt, with which these are compared.
        self.pairs = [(row, k) for row, (item, _) in enumerate(self.rows) for k in range(1, len(item.conditions))]
        self._network = denoiser.with_prompts(Condition.cat([item.conditions for item in items]))
        self._latents = torch.stack([item.path.latents[step] for item, step in self.rows])
        self._timesteps = torch.tensor([item.path.job.timesteps[step] for item, step in self.rows], device=device)
        first, starts = 0, []
        for item in items:
            starts += [first] * len(item.path.steps)
            first += len(item.conditions)
        self._prompts = torch.tensor(starts, device=device)
        self._pairs = torch.tensor(self.pairs, device=device)

    def changes(self, is_pending: Sequence[bool]) -> Iterator[tuple[int, Float[Tensor, "conditions h w"]]]:
        """The pending rows, and how much each condition but the prompt changes the prediction, on the CPU.

        Batches do not depend on which rows are pending; each is copied while the device works on the next one.
        """
        references = torch.empty_like(self._latents, dtype=torch.float32)

        def refer(rows: Int[Tensor, " n"], known: range) -> Tensor:
            rows = rows.clamp(min=0)
            return self._predict(rows, self._prompts[rows])[: len(known)]

        def compare(pairs: Int[Tensor, " n"], known: range) -> Tensor:
            rows, conditions = self._pairs[pairs.clamp(min=0)].T
            outputs = self._predict(rows, self._prompts[rows] + conditions)
            return torch.linalg.vector_norm(outputs - references[rows], dim=1)[: len(known)]

        def has_pending_rows(known: range) -> bool:
            return any(is_pending[row] for row in known)

        def has_pending_pairs(known: range) -> bool:
            return any(is_pending[row] for row, _ in self.pairs[known.start : known.stop])

        for known, outputs in in_batches(len(self.rows), self.denoiser, refer, has_pending_rows):
            if outputs is not None:
                references[known.start : known.stop] = outputs
        maps: list[Tensor] = []

        def complete(known: range, copy: AsyncHostCopy) -> Iterator[tuple[int, Tensor]]:
            (changes,) = copy.wait()
            for (row, k), change in zip(self.pairs[known.start : known.stop], changes, strict=True):
                if k == 1:
                    maps.clear()
                maps.append(change)
                if is_pending[row] and k == len(self.rows[row][0].conditions) - 1:
                    yield row, torch.stack(maps)

        device = self._latents.device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        copied: list[tuple[range, AsyncHostCopy]] = []
        for known, changes in in_batches(len(self.pairs), self.denoiser, compare, has_pending_pairs):
            before = copied
            copied = [] if changes is None else [(known, AsyncHostCopy(changes, stream=stream))]
            for batch in before:
                yield from complete(*batch)
        for batch in copied:
            yield from complete(*batch)

    def _predict(self, rows: Int[Tensor, " n"], conditions: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        latents, timesteps = self._latents[rows], self._timesteps[rows]
        raw = self._network(latents, timesteps, conditions)
        if self.output == "epsilon":
            return self.denoiser.schedule.epsilon(raw, latents, timesteps)
        return self.denoiser.schedule.to_x0_and_eps(raw, latents, timesteps).x0


def _is_equal(condition: Condition, row: int, other: Condition) -> bool:
    """Whether a row of a condition tells the network the same as another condition."""
    return all(torch.equal(value[row], other.tensors[name][0]) for name, value in condition.tensors.items())


def _standard_error(values: Float[Tensor, "n h w"]) -> Float[Tensor, "h w"]:
    """Of the mean of n values: infinite for one."""
    if len(values) < 2:
        return torch.full_like(values[0], torch.inf)
    return values.std(0) / len(values) ** 0.5

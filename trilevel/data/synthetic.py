"""Two generated tasks that a small encoder learns in seconds, made so that a window alone cannot solve them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilevel.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskBatch:
    """Inputs and answers: input_ids (batch, tokens), positions and labels (batch, answers).

    The class `labels[b, a]` is to be predicted from the encoder's output at token `positions[b, a]`.
    """

    input_ids: Tensor
    positions: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallTask:
    """Key-value recall: each region hides one (key, value) token in noise, the last token asks for one of the keys.

    Token 0 is padding and never drawn. `guard` tokens before the question carry no pair, so that no window of two
    layers reaches one.

    Args:
        num_tokens: length, a multiple of `num_regions`.
        num_regions: regions, one pair in each, all keys different.
        num_keys: keys; at least as many as regions.
        num_values: classes; chance is `1 / num_values`.
        num_noise: noise tokens of the vocabulary.
        guard: tokens before the question that are noise.
    """

    num_tokens: int = 64
    num_regions: int = 4
    num_keys: int = 12
    num_values: int = 6
    num_noise: int = 8
    guard: int = 8

    def __post_init__(self) -> None:
        """Check the sizes."""
        size = self.num_tokens // self.num_regions
        if self.num_tokens % self.num_regions or size <= self.guard + 1 or self.num_keys < self.num_regions:
            raise ConfigError(
                f"RecallTask: num_tokens={self.num_tokens} must be a multiple of num_regions={self.num_regions}, a "
                f"region longer than guard + 1 ({self.guard} + 1), num_keys={self.num_keys} no fewer than the regions."
            )

    @property
    def vocab_size(self) -> int:
        """Padding, noise, pairs and questions."""
        return 1 + self.num_noise + self.num_keys * self.num_values + self.num_keys

    @property
    def num_classes(self) -> int:
        """Values a question can have."""
        return self.num_values

    @property
    def region_size(self) -> int:
        """Tokens in a region."""
        return self.num_tokens // self.num_regions

    def batch(self, batch_size: int, *, seed: int, step: int) -> TaskBatch:
        """Draw a batch, a function of (seed, step) alone."""
        generator = _generator(seed, step)
        regions, size = self.num_regions, self.region_size
        input_ids = torch.randint(1, 1 + self.num_noise, (batch_size, self.num_tokens), generator=generator)
        keys = torch.rand(batch_size, self.num_keys, generator=generator).argsort(dim=1)[:, :regions]
        values = torch.randint(self.num_values, (batch_size, regions), generator=generator)
        room = torch.full((regions,), size)
        room[-1] -= self.guard + 1
        offsets = (torch.rand(batch_size, regions, generator=generator) * room).long()
        first_pair = 1 + self.num_noise
        input_ids.scatter_(1, torch.arange(regions) * size + offsets, first_pair + keys * self.num_values + values)
        asked = torch.randint(regions, (batch_size, 1), generator=generator)
        input_ids[:, -1:] = first_pair + self.num_keys * self.num_values + keys.gather(1, asked)
        positions = torch.full((batch_size, 1), self.num_tokens - 1)
        return TaskBatch(input_ids=input_ids, positions=positions, labels=values.gather(1, asked))


@dataclass(frozen=True, slots=True, kw_only=True)
class MajorityTask:
    """Region majority: at the first token of each region, say which symbol the rest of the region has most often.

    Every region has exactly `lead` of the majority symbol; the others share what is left as evenly as it goes. A window
    of two layers sees a handful of tokens of the region, and the mean of all tokens mixes the regions.

    Args:
        num_tokens: length, a multiple of `num_regions`.
        num_regions: regions, one answer for each.
        num_symbols: classes; chance is `1 / num_symbols`.
        lead: tokens of a region that carry the majority symbol.
    """

    num_tokens: int = 128
    num_regions: int = 4
    num_symbols: int = 4
    lead: int = 13

    def __post_init__(self) -> None:
        """Check that the majority is one."""
        rest = self.num_tokens // self.num_regions - 1 - self.lead
        if self.num_tokens % self.num_regions or self.num_symbols < 2 or rest < 0:
            raise ConfigError(
                f"MajorityTask: num_tokens={self.num_tokens} must be a multiple of num_regions={self.num_regions} and "
                f"a region hold more than lead={self.lead} tokens of num_symbols={self.num_symbols} >= 2 symbols."
            )
        if -(-rest // (self.num_symbols - 1)) >= self.lead:
            raise ConfigError(
                f"MajorityTask: lead={self.lead} is no majority of {self.region_size - 1} tokens; raise it."
            )

    @property
    def vocab_size(self) -> int:
        """Padding, the question and the symbols."""
        return 2 + self.num_symbols

    @property
    def num_classes(self) -> int:
        """Symbols."""
        return self.num_symbols

    @property
    def region_size(self) -> int:
        """Tokens in a region, the question included."""
        return self.num_tokens // self.num_regions

    def batch(self, batch_size: int, *, seed: int, step: int) -> TaskBatch:
        """Draw a batch, a function of (seed, step) alone."""
        generator = _generator(seed, step)
        size, shape = self.region_size, (batch_size, self.num_regions)
        labels = torch.randint(self.num_symbols, shape, generator=generator)
        shift = torch.zeros(size - 1, dtype=torch.long)
        shift[self.lead :] = 1 + torch.arange(size - 1 - self.lead) % (self.num_symbols - 1)
        order = torch.rand(*shape, size - 1, generator=generator).argsort(dim=-1)
        symbols = (labels[..., None] + shift[order]) % self.num_symbols
        question = torch.ones(*shape, 1, dtype=torch.long)
        input_ids = torch.cat([question, symbols + 2], dim=-1).reshape(batch_size, self.num_tokens)
        positions = (torch.arange(self.num_regions) * size).expand(batch_size, -1)
        return TaskBatch(input_ids=input_ids, positions=positions, labels=labels)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)

"""Quantization of a trained model: calibrate, round, go on training if wanted, and store the integers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from trilevel.compression.layers import (
    FrozenEmbedding,
    FrozenEmbedding4bit,
    FrozenLinear,
    FrozenLinear4bit,
    FrozenLinear8bitOf4,
    InputGrid,
    QuantizedEmbedding,
    QuantizedLinear,
    Reads,
)
from trilevel.compression.observers import Grid, Method, Observer, check_percentile, make_observer
from trilevel.compression.smooth import smooth
from trilevel.errors import CheckpointError, ConfigError, InputError

Run = Callable[[nn.Module, Any], Any]
FLOAT_PARTS = frozenset({"scorer", "region_gate", "unit_scorer"})
"""Never quantized: they choose tokens and units, and a flipped choice costs more than their few weights."""
SMALLEST_TABLE = 16
"""Rows; a smaller table saves nothing, and token types are also read past `forward`."""
_QUANTIZED = (QuantizedLinear, QuantizedEmbedding, FrozenLinear, FrozenLinear4bit, FrozenEmbedding, FrozenEmbedding4bit)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """What is rounded, and how; the defaults are what kept MiniLM closest (decision 0012).

    Args:
        activations: grid of the inputs of linear maps, one range a map: `int8` around 0, which every runtime takes, or
            `uint8` with a zero point; None rounds weights only.
        observer: how ranges are found: `minmax`, `percentile` or `mse`, see `make_observer`.
        percentile: for the observer of that name.
        weight_bits: 8, or 4: stored in half the bytes. Computed with in 8 bits where activations are rounded, else in
            floating point.
        group_size: 32, 64 or 128 inputs that share a scale, for 4 bits.
        quantize_embeddings: tables of 16 rows or more are rounded.
        embedding_bits: 8 with a scale for each row, or 4 with one for each group.
        smooth: alpha of SmoothQuant, 0 to 1; None for none. Nothing to smooth with `activations=None`.
        learned_ranges: scales of inputs and weights are parameters for the training that follows; else they stay.
        skip: names of modules that stay float, with everything in them; `*` stands for any text, as in
            `encoder.stack.blocks.*.ffn`.
        float_inputs: names, in the same way, of modules whose weights alone are rounded, in everything in them.

    Raises:
        ConfigError: a value is unknown or contradicts another.
    """

    activations: Grid | None = "int8"
    observer: Method = "minmax"
    percentile: float = 99.999
    weight_bits: int = 8
    group_size: int = 32
    quantize_embeddings: bool = True
    embedding_bits: int = 8
    smooth: float | None = 0.85
    learned_ranges: bool = False
    skip: tuple[str, ...] = ()
    float_inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activations is not None and self.activations not in get_args(Grid):
            raise ConfigError(f"activations={self.activations!r} is none of int8, uint8 and None.")
        if self.observer not in get_args(Method):
            raise ConfigError(f"observer={self.observer!r} is unknown; known are {', '.join(get_args(Method))}.")
        check_percentile(self.percentile)
        if self.weight_bits not in (4, 8):
            raise ConfigError(f"weight_bits={self.weight_bits} must be 8 or 4.")
        if self.embedding_bits not in (4, 8):
            raise ConfigError(f"embedding_bits={self.embedding_bits} must be 8 or 4.")
        if self.group_size not in (32, 64, 128):
            raise ConfigError(f"group_size={self.group_size} must be 32, 64 or 128.")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise ConfigError(f"smooth={self.smooth} must be 0 to 1, or None.")


def call(model: nn.Module, batch: Any) -> Any:
    """`model(batch)`."""
    return model(batch)


def quantize(model: nn.Module, config: QuantizeConfig, batches: Iterable[Any] = (), run: Run = call) -> nn.Module:
    """A copy of `model` whose linear maps and tables round to integers; `model` is left alone.

    This alone is post-training quantization. Training the result further is quantization-aware training: weights stay
    float parameters and gradients pass straight through the rounding; without dropout, which undid all of it on MiniLM.
    `freeze` then stores the integers.

    Left float: norms, softmax, convolutions, what chooses tokens and units (`scorer`, `region_gate`, `unit_scorer`,
    `pool_weight`), linear maps with one output and tables of fewer than 16 rows.

    Args:
        model: a float model.
        config: what is rounded.
        batches: calibration data, run one after another and not kept; give all the lengths that will be served. Read
            twice with `config.smooth`. Not needed for `activations=None`.
        run: how a batch is run through the model.

    Raises:
        ConfigError: the model is quantized already, `config.skip` names nothing, or no batches are there.
        InputError: a linear map saw no input, or activations that are not finite.
    """
    draft = prepare(model, config, batches, run)
    return replaced(draft.model, {id(draft.model.get_submodule(name)): new for name, new in draft.made.items()})


@dataclass(frozen=True, slots=True)
class Draft:
    """A smoothed float copy of a model that computes what the model does, and the quantized module of each name."""

    model: nn.Module
    made: dict[str, QuantizedLinear | QuantizedEmbedding]


def prepare(model: nn.Module, config: QuantizeConfig, batches: Iterable[Any] = (), run: Run = call) -> Draft:
    """All that `quantize` does but putting the modules in their places."""
    draft = copy.deepcopy(model)
    chosen = targets(draft, config)
    linears = {
        name: part
        for name, part in chosen.items()
        if isinstance(part, nn.Linear) and not _is_within(name, config.float_inputs)
    }
    multipliers: dict[nn.Linear, Tensor] = {}
    ranges: dict[str, tuple[float, float]] = {}
    if config.activations is not None and linears:
        if config.smooth is not None:
            if iter(batches) is iter(batches):
                raise ConfigError("smooth reads the batches twice, and an iterator was given. Give a list.")
            largest = _largest_inputs(draft, linears, batches, run)
            multipliers = smooth(draft, {linears[name]: value for name, value in largest.items()}, config.smooth)
            for linear, factor in multipliers.items():
                linear.register_forward_pre_hook(partial(_multiply, factor))
        ranges = _ranges(draft, linears, config, batches, run)
    made: dict[str, QuantizedLinear | QuantizedEmbedding] = {}
    for name, part in chosen.items():
        if isinstance(part, nn.Embedding):
            made[name] = QuantizedEmbedding.of(part, bits=config.embedding_bits, group_size=config.group_size)
            continue
        made[name] = QuantizedLinear.of(
            part,
            bits=config.weight_bits,
            group_size=config.group_size,
            reads=_grid(config.activations, ranges[name]) if config.activations and name in ranges else None,
            multiplier=multipliers.get(part),
            is_learned=config.learned_ranges,
        )
    return Draft(draft, made)


def _grid(grid: Grid, ends: tuple[float, float]) -> InputGrid:
    return InputGrid(grid=grid, low=ends[0], high=ends[1])


def targets(model: nn.Module, config: QuantizeConfig) -> dict[str, nn.Linear | nn.Embedding]:
    """The modules that `quantize` replaces, by name, in order.

    Raises:
        ConfigError: the model is quantized already, or `config.skip` or `config.float_inputs` names nothing.
    """
    names = {name for name, _ in model.named_modules()}
    for option, given in {"skip": config.skip, "float_inputs": config.float_inputs}.items():
        for name in given:
            if not any(fnmatchcase(own, name) for own in names):
                raise ConfigError(
                    f"{option} names {name!r}, which the model has not; its modules are those of named_modules()."
                )
    chosen: dict[str, nn.Linear | nn.Embedding] = {}
    for name, part in model.named_modules():
        if isinstance(part, _QUANTIZED):
            raise ConfigError(f"{name or 'the model'} is quantized already. Give the float model.")
        if _is_within(name, config.skip) or FLOAT_PARTS & set(name.split(".")):
            continue
        # subclasses compute something else
        if type(part) is nn.Linear:
            if part.out_features > 1:
                chosen[name] = part
        elif type(part) is nn.Embedding and config.quantize_embeddings and _is_plain(part):
            chosen[name] = part
    return chosen


def _is_within(name: str, others: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, other) or fnmatchcase(name, f"{other}.*") for other in others)


def _is_plain(table: nn.Embedding) -> bool:
    return table.num_embeddings >= SMALLEST_TABLE and table.max_norm is None and not table.sparse


def _multiply(factor: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0] * factor, *inputs[1:]


@contextmanager
def _watched(model: nn.Module, watch: dict[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """Show each watcher the input of its module, in evaluation mode and without gradients."""
    modes = {part: part.training for part in model.modules()}
    hooks = [part.register_forward_pre_hook(partial(_show, see)) for part, see in watch.items()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode


def _show(see: Callable[[Tensor], None], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    see(inputs[0])


def _run_all(model: nn.Module, batches: Iterable[Any], run: Run) -> None:
    count = 0
    for batch in batches:
        run(model, batch)
        count += 1
    if not count:
        raise ConfigError("no calibration batches were given, and activations are rounded. Give some, of all lengths.")


def _largest_inputs(
    model: nn.Module, linears: dict[str, nn.Linear], batches: Iterable[Any], run: Run
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        largest = x.abs().reshape(-1, x.shape[-1]).amax(0)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    with _watched(model, {part: partial(see, name) for name, part in linears.items()}):
        _run_all(model, batches, run)
    return found


def _ranges(
    model: nn.Module, linears: dict[str, nn.Linear], config: QuantizeConfig, batches: Iterable[Any], run: Run
) -> dict[str, tuple[float, float]]:
    assert config.activations is not None
    observers: dict[str, Observer] = {
        name: make_observer(config.observer, percentile=config.percentile) for name in linears
    }
    with _watched(model, {part: observers[name].update for name, part in linears.items()}):
        _run_all(model, batches, run)
    unseen = [name for name, observer in observers.items() if observer.is_empty]
    if unseen:
        raise InputError(
            f"{', '.join(unseen)} saw no input in the calibration batches. Give batches that run it, or name it in "
            "skip."
        )
    return {name: observer.range(config.activations) for name, observer in observers.items()}


def replaced(model: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """`model` with the children whose id is in `made` replaced, wherever they stand."""
    if id(model) in made:
        return made[id(model)]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    return model


def freeze(model: nn.Module) -> nn.Module:
    """A copy with stored integers in place of the float masters: same outputs bit for bit, a quarter of the size.

    Raises:
        ConfigError: nothing in the model is quantized.
    """
    frozen = copy.deepcopy(model)
    made: dict[int, nn.Module] = {
        id(part): part.frozen() for part in frozen.modules() if isinstance(part, QuantizedLinear | QuantizedEmbedding)
    }
    if not made:
        raise ConfigError("the model has no quantized modules to freeze. Call quantize first.")
    return replaced(frozen, made)


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, of a quantized model as they will be when it is frozen."""
    is_master = any(isinstance(part, QuantizedLinear | QuantizedEmbedding) for part in model.modules())
    stored = freeze(model) if is_master else model
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.state_dict().values())


def load_frozen(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy of the float `model` with the weights of a frozen one of the same architecture.

    Which modules are quantized is read off the names in `state`.

    Raises:
        CheckpointError: `state` belongs to another model.
    """
    loaded = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    for name, part in loaded.named_modules():
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if isinstance(part, nn.Linear | nn.Embedding) and ("weight_int8" in own or "packed" in own):
            made[id(part)] = _empty(part, own)
    loaded = replaced(loaded, made)
    try:
        loaded.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"the stored weights belong to another model: {error}") from error
    return loaded


def _empty(part: nn.Linear | nn.Embedding, own: dict[str, Tensor]) -> nn.Module:
    """A frozen module with room for the tensors of `own`."""
    room = {key: torch.empty_like(value) for key, value in own.items()}
    if isinstance(part, nn.Embedding):
        if "packed" in room:
            frozen_table = FrozenEmbedding4bit(room["packed"], room["row_scale"], part.padding_idx, part.embedding_dim)
            return frozen_table.train(part.training)
        return FrozenEmbedding(room["weight_int8"], room["row_scale"], part.padding_idx).train(part.training)
    reads = Reads(*(room.get(f"reads.input_{name}") for name in ("multiplier", "scale", "zero_point")))
    bias = nn.Parameter(room["bias"]) if "bias" in room else None
    if "packed" in room:
        end = (room["weight_scale"], bias, reads, part.in_features)
        if "weight_factors" in room:
            return FrozenLinear8bitOf4(room["packed"], room["weight_factors"], *end).train(part.training)
        return FrozenLinear4bit(room["packed"], *end).train(part.training)
    return FrozenLinear(room["weight_int8"], room["weight_scale"], bias, reads).train(part.training)

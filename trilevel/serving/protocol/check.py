"""Whether inputs are those of the model."""

from __future__ import annotations

from trilevel.errors import InputError
from trilevel.serving.protocol.tensors import datatype_of
from trilevel.serving.requests import Arrays, ModelInfo


def check_inputs(inputs: Arrays, model: ModelInfo) -> None:
    """Raises InputError: an input is missing, unknown, of another type or shape, or of other rows than others."""
    specs = {spec.name: spec for spec in model.inputs}
    if inputs.keys() != specs.keys():
        given, needed = ", ".join(sorted(inputs))[:200], ", ".join(specs)
        raise InputError(f"model {model.name!r} has the inputs {needed}; {given or 'none'} were sent.")
    for name, array in inputs.items():
        spec = specs[name]
        given, needed = datatype_of(array.dtype), datatype_of(spec.dtype)
        if given != needed:
            raise InputError(f"input {name!r} of model {model.name!r} is {needed}; {given} was sent.")
        sizes = zip(array.shape, spec.shape, strict=False)
        if array.ndim != len(spec.shape) or any(size not in (one, -1) for one, size in sizes):
            raise InputError(
                f"input {name!r} of model {model.name!r} has the shape {list(spec.shape)}, -1 for any size; "
                f"{list(array.shape)} was sent."
            )
    if len({len(array) for array in inputs.values()}) > 1:
        rows = ", ".join(f"{name} {len(array)}" for name, array in inputs.items())
        raise InputError(f"the first axis of all inputs is the rows and must be the same; sent were {rows}.")


def wanted_outputs(names: tuple[str, ...], model: ModelInfo) -> tuple[str, ...]:
    """The outputs to send: those asked for, else all; raises InputError for one that the model lacks."""
    known = tuple(spec.name for spec in model.outputs)
    for name in names:
        if name not in known:
            raise InputError(f"output {name[:80]!r} is none of model {model.name!r}, which has {', '.join(known)}.")
    return names or known

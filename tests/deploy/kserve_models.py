"""Runs where KServe's own models are: every field of the manifests of `kserve_models.py FILE` is one, of its type."""

# mypy: ignore-errors
from __future__ import annotations

import re
import sys
from typing import Any

import kserve.models
import kubernetes.client
import pydantic
import yaml

KINDS = {
    "ServingRuntime": kserve.models.V1alpha1ServingRuntime,
    "InferenceService": kserve.models.V1beta1InferenceService,
}
PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def check(value: Any, kind: str, where: str) -> int:
    """How many fields were looked at; raises ValueError for one that is unknown or of another type."""
    if found := re.fullmatch(r"(list|dict)[\[(](?:str, ?)?(.+)[\])]", kind):
        items = dict(enumerate(value)) if found[1] == "list" else value
        return sum(check(one, found[2], f"{where}[{key}]") for key, one in items.items())
    if kind in PLAIN:
        if not isinstance(value, PLAIN[kind]):
            raise ValueError(f"{where}: {value!r} is no {kind}")
        return 1
    model = getattr(kserve.models, kind, None) or getattr(kubernetes.client, kind, None)
    if model is None or not hasattr(model, "openapi_types"):
        # quantities and ports, which may be numbers or texts
        return 1
    if issubclass(model, pydantic.BaseModel):
        model.model_validate(value)
        return 1
    fields = {own: name for name, own in model.attribute_map.items()}
    if unknown := value.keys() - fields.keys():
        raise ValueError(f"{where}: {', '.join(sorted(unknown))} is no field of {kind}")
    if lacking := {own for own, name in fields.items() if own not in value and required(model, name)}:
        raise ValueError(f"{where}: {', '.join(sorted(lacking))} is missing")
    return sum(check(one, model.openapi_types[fields[key]], f"{where}.{key}") for key, one in value.items())


def required(model: Any, name: str) -> bool:
    """Whether the model refuses None there."""
    lenient = kubernetes.client.Configuration()
    lenient.client_side_validation = False
    empty = model(local_vars_configuration=lenient)
    lenient.client_side_validation = True
    try:
        setattr(empty, name, None)
    except ValueError:
        return True
    return False


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:  # noqa: PTH123 - as short as it can be
        for one in yaml.safe_load_all(file):
            sys.stdout.write(f"{one['kind']} {check(one, KINDS[one['kind']].__name__, one['kind'])}\n")


if __name__ == "__main__":
    main()

"""What is exported: `calibrated` attention in operators that every runtime has (ONNX, OpenVINO, TensorRT).

Without what only torch can do: one sequence a row, real tokens first, no data-dependent shapes, no gradient of the
selection. Rows of any length are cut into blocks (`graph_blocks`), few tokens of a fixed number are not
(`graph_whole`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilevel.attention.call import Call
from trilevel.attention.impl import graph_blocks, graph_whole
from trilevel.attention.impl.graph_entries import hide
from trilevel.errors import ImplementationError

MOST_WHOLE_TOKENS = 512
"""Above, blocks pay."""


def obstacle(call: Call) -> str | None:
    """Why this call cannot be written in such a graph, None if it can."""
    reasons = {
        "causal attention": call.is_causal,
        "mode='strict'": call.levels.mode == "strict",
        "union=True": call.levels.union,
        "num_regions (use region_size)": call.levels.region_size is None and call.split.regional > 0,
        "segment_ids": call.segment is not None,
        "global_forced": call.forced is not None,
        "selection_gradient='gate'": call.levels.selection_gradient == "gate",
        "return_lse=True": call.needs_lse,
    }
    return next((name for name, is_given in reasons.items() if is_given), None)


def attend(call: Call) -> tuple[Tensor, None]:
    """Outputs (batch, heads, tokens, dim).

    Raises:
        ImplementationError: the call is none that can be exported, or padding stands before a real token.
    """
    missing = obstacle(call)
    if missing is not None:
        raise ImplementationError(f"impl='graph', what is exported, does not do {missing}. Use impl='auto'.")
    _check_padding(call)
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (x if group == 1 else x.repeat_interleave(group, 1) for x in (call.key, call.value))
    weight = call.pool_weight
    if weight is not None and group > 1:
        weight = weight.repeat_interleave(group, 0)
    form = graph_whole.Form(call) if has_few_tokens(call) else graph_blocks.Form(call)
    attend_class = (form.local, form.regional, form.global_)
    outs, start = [], 0
    for index, heads in enumerate(call.split):
        own = slice(start, start + heads)
        start += heads
        if heads:
            q, k, v = call.query[:, own], key[:, own], value[:, own]
            outs.append(attend_class[index](q, k, v, None if weight is None else weight[own]))
    out = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
    return _real_rows(out, call.valid), None


def has_few_tokens(call: Call) -> bool:
    """Whether rows are computed whole: their number of tokens is fixed and small in what is exported."""
    tokens = call.query.shape[2]
    return torch.compiler.is_exporting() and isinstance(tokens, int) and tokens <= MOST_WHOLE_TOKENS


def dense(call: Call) -> Tensor:
    """Dense attention of the call over its real tokens; what is exported of `levels=None`."""
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (x if group == 1 else x.repeat_interleave(group, 1) for x in (call.key, call.value))
    logits = (call.query * call.scale) @ key.transpose(-1, -2)
    if call.valid is not None:
        logits = logits + hide(call.valid, logits.dtype)[:, None, None, :]
    return _real_rows(torch.softmax(logits, -1) @ value, call.valid)


def _real_rows(out: Tensor, valid: Tensor | None) -> Tensor:
    """0 in the rows of padding."""
    return out if valid is None else torch.where(valid[:, None, :, None], out, 0)


def _check_padding(call: Call) -> None:
    if call.valid is None or torch.compiler.is_compiling():
        return
    if (call.valid[:, 1:] & ~call.valid[:, :-1]).any():
        raise ImplementationError("impl='graph' needs the padding of every row behind its last real token.")

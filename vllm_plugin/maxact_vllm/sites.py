"""Hop 2/9: which tensors of a loaded model are sites, found by the role of modules, never by architecture names.

What is looked for: the list of decoder layers (its members hold vLLM's attention-like layers), in each layer the block
around that layer and the other block with linear layers (the MLP), the linear layers in them, what attention caches,
the router and the experts, norms behind a block, and beside the list the embedding and the final norm. A role that
cannot be found yields no site; a model without a layer list yields none.

The residual stream needs care: most layers return an un-added ``(hidden, residual)`` and the add is fused into the next
norm, so `hidden` of layer i is read at the first norm of layer i + 1 (or the final norm), which has just made it.
"""

from __future__ import annotations

import copy
import dis
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from maxact_vllm.compat import cache_replicas, cached, holds_attention, is_missing_layer, is_mixer, static_scale
from maxact_vllm.instrument import Reads, Tap


def find_taps(model: nn.Module, hidden_size: int, num_layers: int) -> list[Tap]:
    """All sites of a model this rank holds, in the order a token meets them. Empty where no layer list is found."""
    found = _layer_list(model, num_layers)
    if found is None:
        return []
    path, layers = found
    around_path, _, _ = path.rpartition(".")
    around = model.get_submodule(around_path)
    taps = list(_embedding(around, around_path, hidden_size))
    for index, layer in enumerate(layers):
        if not is_missing_layer(layer):
            taps += _layer_taps(index, f"{path}.{index}", layer, hidden_size)
    final_norm = _final_norm(model, around, around_path)
    taps += _hidden_taps(path, list(layers), final_norm, hidden_size)
    if final_norm is not None:
        name, norm = final_norm
        taps.append(
            Tap(layer=None, name="final_norm", path=name, module=norm, reads="output", width=hidden_size),
        )
    return taps


def _layer_list(model: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList] | None:
    """The longest module list of ``num_layers`` members with attention in them, and its path."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and holds_attention(module):
            return path, module
    return None


def _embedding(around: nn.Module, path: str, hidden_size: int) -> Iterator[Tap]:
    """The token embedding beside the layers, or in a part of the model beside them."""
    found = [(name, child) for name, child in around.named_modules() if _embeds(child)]
    for name, child in sorted(found, key=lambda item: (item[0].count("."), item[1].embedding_dim != hidden_size))[:1]:
        name, called = _called(around, name)
        width = child.embedding_dim
        yield Tap(layer=None, name="embedding", path=_join(path, name), module=called, reads="output", width=width)


def _embeds(module: nn.Module) -> bool:
    return isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)


def _layer_taps(index: int, path: str, layer: nn.Module, hidden_size: int) -> Iterator[Tap]:
    children = list(layer.named_children())
    attention = next(((name, child) for name, child in children if holds_attention(child)), None)
    if attention is not None:
        names = ("attn_input", "o_proj_input", "attn_output")
        yield from _block_taps(index, _join(path, attention[0]), attention[1], names, hidden_size)
        yield from _cache_taps(index, _join(path, attention[0]), attention[1])
    mlp = next(((name, child) for name, child in children if _is_block(child) and not holds_attention(child)), None)
    if mlp is not None:
        names = ("mlp_input", "down_proj_input", "mlp_output")
        yield from _block_taps(index, _join(path, mlp[0]), mlp[1], names, hidden_size)
        yield from _gate_taps(index, _join(path, mlp[0]), mlp[1])
    elif any(isinstance(child, LinearBase) for _, child in children):
        yield from _bare_mlp_taps(index, path, layer)
    yield from _expert_taps(index, path, layer, attention[0] if attention else "", hidden_size)
    yield from _post_norm_taps(index, path, layer, attention, mlp, hidden_size)


def _is_block(module: nn.Module) -> bool:
    """An MLP: it has an output projection, or experts that have one. Routers and mixers of streams have neither."""
    return _has_experts(module) or any(_is_row(inner) for inner in module.modules() if inner is not module)


def _has_experts(module: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in module.named_modules())


def _block_taps(
    index: int, path: str, block: nn.Module, names: tuple[str, str, str], hidden_size: int
) -> Iterator[Tap]:
    into, out_of, output = names
    linears = [(name, inner) for name, inner in block.named_modules() if isinstance(inner, LinearBase)]
    # By width too: a Mamba's convolution is a linear layer to vLLM, never called, and its inner projections are narrow;
    # without a plan for tensor parallelism, the Transformers backend makes all of them alike.
    narrowing = [name for name, inner in linears if inner.output_size == hidden_size != inner.input_size]
    rows = [name for name, inner in linears if _is_row(inner) and inner.output_size == hidden_size] or narrowing
    taking = [name for name, inner in linears if not _is_row(inner) and inner.input_size == hidden_size]
    columns = [name for name in taking if name not in rows]
    if _has_experts(block):
        # On GPUs experts and router run in an operation that the compiler does not look into.
        yield Tap(layer=index, name=into, path=path, module=block, reads="input", width=hidden_size)
    elif columns:
        yield replace(_input_tap(index, into, path, block, columns[0]), alone=_is_opaque(block, columns[0]))
    if rows:
        alone = _has_experts(block) or _is_opaque(block, rows[-1])
        yield replace(_input_tap(index, out_of, path, block, rows[-1]), alone=alone)
    yield Tap(layer=index, name=output, path=path, module=block, reads="output", width=hidden_size)


def _is_opaque(block: nn.Module, name: str) -> bool:
    """Whether a module of ``block`` stands inside a mixer, such as a short convolution, which may be one operation to
    the compiler as a whole."""
    parts = name.split(".")
    above = [block, *(block.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))]
    return any(is_mixer(module) for module in above)


def _cache_taps(index: int, path: str, block: nn.Module) -> Iterator[Tap]:
    """What attention puts into the KV cache: keys and values, or the latent vector that both are made of."""
    replicas = cache_replicas(block)
    for name, inner in block.named_modules():
        caches = cached(inner, replicas)
        for each in caches:
            reads: Reads = "second argument" if each.site == "k" else "third argument"
            yield Tap(
                layer=index,
                name=each.site,
                path=_join(path, name),
                module=inner,
                reads=reads,
                width=each.width,
                sharded=each.sharded,
                alone=_is_opaque(block, name),
                scale=each.scale,
            )
        if caches:
            return


def _gate_taps(index: int, path: str, block: nn.Module) -> Iterator[Tap]:
    """The gate projection before the activation: the first half of a merged projection, or one that is named so."""
    for name, inner in block.named_modules():
        if isinstance(inner, MergedColumnParallelLinear) and len(inner.output_sizes) == 2:
            width = inner.output_sizes[0]
        elif isinstance(inner, LinearBase) and name.rpartition(".")[2] == "gate_proj":
            width = inner.output_size
        else:
            continue
        tp_size = getattr(inner, "tp_size", 1)
        path_of_called, called = _called(block, name)
        yield Tap(
            layer=index,
            name="mlp_gate",
            path=_join(path, path_of_called),
            module=called,
            reads="output",
            width=width // tp_size,
            sharded=tp_size > 1,
            alone=_has_experts(block) or _is_opaque(block, name),
        )
        return


def _expert_taps(index: int, path: str, layer: nn.Module, attention: str, hidden_size: int) -> Iterator[Tap]:
    """The router's output and what the experts are given. Products inside experts are made by no module."""
    inside = [
        (name, inner)
        for name, inner in layer.named_modules()
        if not (attention and f"{name}.".startswith(f"{attention}."))
    ]
    experts = next(((name, inner) for name, inner in inside if name.rpartition(".")[2] == "experts"), None)
    if experts is None:
        return
    name, inner = experts
    yield Tap(
        layer=index,
        name="moe_input",
        path=_join(path, name),
        module=inner,
        reads="input",
        width=hidden_size,
        alone=True,
    )
    for name, inner in inside:
        if isinstance(inner, LinearBase) and (
            type(inner).__name__ == "GateLinear" or name.rpartition(".")[2] in ("gate", "router")
        ):
            width = inner.output_size
            yield Tap(
                layer=index,
                name="router_logits",
                path=_join(path, name),
                module=inner,
                reads="output",
                width=width,
                alone=True,
            )
            return


Child = tuple[str, nn.Module]


def _post_norm_taps(
    index: int, path: str, layer: nn.Module, attention: Child | None, mlp: Child | None, hidden_size: int
) -> Iterator[Tap]:
    """Sandwich norms, by when a layer's forward asks for them: behind a block, and not the one in front of the next."""
    if attention is None or mlp is None:
        return
    norms = [name for name, child in layer.named_children() if _is_norm(child)]
    order = [name for name in _order_of_use(layer.forward) if name in (*norms, attention[0], mlp[0])]
    if attention[0] not in order or mlp[0] not in order[order.index(attention[0]) :]:
        return
    first, second = order.index(attention[0]), order.index(mlp[0])
    before, between, behind = order[:first], order[first + 1 : second], order[second + 1 :]
    if between and behind and (len(between) > 1 or not before):
        yield _norm_tap(index, "attn_post_norm", path, layer, between[0], hidden_size)
    # Embeddings per layer are added behind the MLP's own residual add.
    behind = [name for name in behind if "per_layer" not in name]
    if behind:
        yield _norm_tap(index, "post_norm", path, layer, behind[-1], hidden_size)


def _norm_tap(index: int, site: str, path: str, layer: nn.Module, name: str, width: int) -> Tap:
    module = layer.get_submodule(name)
    return Tap(layer=index, name=site, path=_join(path, name), module=module, reads="output", width=width)


def _order_of_use(method: Callable[..., Any]) -> list[str]:
    """Names of attributes in the order a method asks for them first."""
    asked = [each.argval for each in dis.get_instructions(inspect.unwrap(method)) if "LOAD_" in each.opname]
    return list(dict.fromkeys(name for name in asked if isinstance(name, str)))


def _is_row(linear: nn.Module) -> bool:
    return isinstance(linear, RowParallelLinear)


def _bare_mlp_taps(index: int, path: str, layer: nn.Module) -> Iterator[Tap]:
    """OPT's way: the two linear layers of the MLP stand in the decoder layer itself."""
    for name, linear in layer.named_children():
        if isinstance(linear, RowParallelLinear):
            yield _input_tap(index, "down_proj_input", path, layer, name)
            width = linear.output_size
            yield Tap(
                layer=index, name="mlp_output", path=_join(path, name), module=linear, reads="output", width=width
            )
        elif isinstance(linear, LinearBase):
            yield _input_tap(index, "mlp_input", path, layer, name)


def _input_tap(index: int, site: str, path: str, parent: nn.Module, name: str) -> Tap:
    linear = parent.get_submodule(name)
    sharded = isinstance(linear, RowParallelLinear) and linear.input_is_parallel and linear.tp_size > 1
    width = linear.input_size_per_partition if sharded else linear.input_size
    name, called = _called(parent, name)
    return Tap(
        layer=index,
        name=site,
        path=_join(path, name),
        module=called,
        reads="input",
        width=width,
        sharded=sharded,
        scale=static_scale(linear),
    )


def _called(parent: nn.Module, name: str) -> tuple[str, nn.Module]:
    """What is called in the place of a linear layer or an embedding, and its path: a LoRA wrapper computes with the
    layer it wraps, but never calls it."""
    called = name.removesuffix(".base_layer")
    return called, parent.get_submodule(called)


def _hidden_taps(
    path: str, layers: list[nn.Module], final_norm: tuple[str, nn.Module] | None, hidden_size: int
) -> Iterator[Tap]:
    for index, layer in enumerate(layers):
        behind = layers[index + 1] if index + 1 < len(layers) else None
        norm = final_norm if behind is None else _first_norm(behind, _join(path, str(index + 1)))
        if is_missing_layer(layer):
            # The last layer of the pipeline stage before this one: its residual is made by our first norm.
            if behind is not None and norm is not None and _returns_unadded(behind, hidden_size):
                yield _hidden(index, *norm, "residual", hidden_size)
        elif not _returns_unadded(layer, hidden_size):
            yield _hidden(index, _join(path, str(index)), layer, "output", hidden_size)
        elif behind is None or not is_missing_layer(behind):
            if norm is not None:
                yield _hidden(index, *norm, "residual", hidden_size)
            else:
                yield _hidden(index, _join(path, str(index)), layer, "sum", hidden_size)


def _hidden(index: int, path: str, module: nn.Module, reads: Reads, hidden_size: int) -> Tap:
    return Tap(layer=index, name="hidden", path=path, module=module, reads=reads, width=hidden_size)


def _returns_unadded(layer: nn.Module, hidden_size: int) -> bool:
    """Whether the last add is left to the next norm. What a layer returns is complete where it takes no residual, or
    overwrites the one it was given, or where its own norm adds nothing."""
    given = "residual" in inspect.signature(layer.forward).parameters
    if not given or _first_use(layer.forward, "residual") != "LOAD":
        return False
    norm = _first_norm(layer, "")
    return norm is None or _adds_residual(norm[1], hidden_size)


def _first_use(method: Callable[..., Any], name: str) -> str:
    """What a method does first with a variable: ``LOAD``, ``STORE``, or nothing."""
    for each in dis.get_instructions(inspect.unwrap(method)):
        names = each.argval if isinstance(each.argval, tuple) else (each.argval,)  # Python 3.13 joins two in one
        for verb, variable in zip(re.findall("LOAD|STORE", each.opname), names, strict=False):
            if variable == name:
                return str(verb)
    return ""


def _adds_residual(norm: nn.Module, width: int) -> bool:
    """Whether ``norm(x, residual)`` returns ``x + residual``: asked of a copy, for some hand the residual through."""
    # Where the weights are, for vLLM's kernels are those of its platform; without weights, of none.
    device = next((weight.device for weight in norm.parameters() if not weight.is_meta), torch.device("cpu"))
    copied = copy.deepcopy(norm).to_empty(device=device).float()
    forward = getattr(copied, "forward_native", copied.forward)
    x = torch.ones(1, width, dtype=torch.float32, device=device)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = forward(x, 2 * x)
    except TypeError:  # it takes no residual
        return True
    # Not 3 * x: a kernel may write over what it is given.
    return not isinstance(output, tuple) or bool((output[1] == 3).all())


def _first_norm(layer: nn.Module, path: str) -> tuple[str, nn.Module] | None:
    norms = [(_join(path, name), child) for name, child in layer.named_children() if _is_norm(child)]
    return next((norm for norm in norms if norm[0].endswith(".input_layernorm")), norms[0] if norms else None)


def _final_norm(model: nn.Module, around: nn.Module, path: str) -> tuple[str, nn.Module] | None:
    """The last norm beside the layers, unless it is left to ``compute_logits``, which sees the sampled rows only."""
    norms = [name for name, child in around.named_children() if _is_norm(child)]
    if not norms:
        return None
    name = norms[-1]
    heads = [module.compute_logits for module in model.modules() if hasattr(module, "compute_logits")]
    if any(_names(head, name) for head in heads) and not _names(around.forward, name):
        return None
    return _join(path, name), around.get_submodule(name)


def _names(method: Callable[..., Any], name: str) -> bool:
    return name in inspect.unwrap(method).__code__.co_names


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name

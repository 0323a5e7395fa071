"""Sites of structurally different architectures, tiny and random, against plain hooks: a small `make architectures`."""

from __future__ import annotations

from typing import Any

import architecture_check as check
import architectures
import pytest
from architecture_models import FIRST, Recipe
from architecture_run import TOKENS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

STRUCTURES = {
    "fused residual, routed experts": "Qwen3MoeForCausalLM",
    "sandwich norms": "Gemma2ForCausalLM",
    "attention and MLP in parallel on one norm": "Cohere2ForCausalLM",
    "latent attention, shared experts": "DeepseekV2ForCausalLM",
    "linear attention, gated shared expert": "Qwen3_5MoeForCausalLM",
    "Mamba beside attention": "FalconH1ForCausalLM",
    "final norm on the sampled rows only": "MiMoForCausalLM",
}
NEVER = {("down_proj_input", "routed experts are no modules"), ("final_norm", "its rows are not the tokens")}
"""What no hook can see, with its reason."""


@pytest.fixture(scope="module", params=STRUCTURES.values(), ids=STRUCTURES.keys())
def served(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Any]]:
    """One architecture, served in native eager mode, and all that is known of it."""
    cache = tmp_path_factory.mktemp("architectures")
    architectures.prepare(cache)
    recipe = next(recipe for recipe in FIRST if recipe.name == request.param)
    result = architectures.run(cache, recipe, "native")
    assert "sites" in result, result.get("error")
    return recipe, architectures.results(cache, recipe)


def test_extrema_are_bit_equal_to_plain_hooks_and_tokens_exact(served: tuple[Recipe, dict[str, Any]]) -> None:
    native = served[1]["native"]
    assert check.differences(native) == []
    assert native["tokens"] == TOKENS


def test_a_site_is_missing_only_where_no_hook_can_see_it(served: tuple[Recipe, dict[str, Any]]) -> None:
    native = served[1]["native"]
    for name, layers in check.unobserved(native).items():
        for layer in layers:
            assert (name, check.reason(native, name, layer).partition(":")[0]) in NEVER


def test_hidden_is_what_transformers_computes(served: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, results = served
    tolerance = 1e-4 if recipe.dtype == "float32" else 0.03
    deviation = check.transformers_deviation(results["native"], results["transformers"])
    assert deviation is not None
    assert deviation < tolerance

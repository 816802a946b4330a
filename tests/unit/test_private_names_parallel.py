"""Private names of torch, Composer and DeepSpeed: still there, and used by the adapters alone."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "lgm_scale"
ADAPTERS = {
    name: (PACKAGE / "parallel" / f"{name}.py").read_text()
    for name in ("torch_internals", "composer_internals", "deepspeed_internals")
}
ZERO_1_2 = "deepspeed.runtime.zero.stage_1_and_2"
ZERO_3 = "deepspeed.runtime.zero.stage3"
PARTITION = "deepspeed.runtime.zero.partition_parameters"

# (adapter, module or class, name, what breaks without it)
ATTRIBUTES = [
    ("torch", "torch", "_dynamo", "compiled blocks at many token lengths"),
    ("torch", "torch._dynamo.config", "recompile_limit", "compiled blocks at many token lengths"),
    ("torch", "torch", "_foreach_lerp_", "the moving average in a few kernels"),
    ("torch", "torch.utils", "_python_dispatch", "counting collectives and simulated steps"),
    ("torch", "torch.utils", "_pytree", "counting collectives and simulated steps"),
    ("torch", "torch", "_subclasses", "simulated steps"),
    ("torch", "torch.testing", "_internal", "simulated ranks"),
    ("composer", "composer.Trainer", "_wrap_model_for_distributed", "FSDP and ZeRO at all"),
    ("composer", "composer.core.State", "_dataset_state_dict", "the place in the data, saved"),
    ("composer", "composer.core.State", "_load_dataset_state", "the place in the data, loaded"),
    (
        "composer",
        "composer.distributed.fsdp2_utils",
        "sync_optimizer_and_model_params",
        "the optimizer's groups under FSDP",
    ),
    ("composer", "composer.utils.collect_env", "get_cpu_model", "a start without interpreters"),
    ("deepspeed", "deepspeed.ops", "__compatible_ops__", "a start without compiling on CPUs"),
]
# Set on objects when DeepSpeed starts: looked for in the source of (adapter, module).
ASSIGNED = [
    ("torch", "torch._ops", "_schema", "counting collectives and simulated steps"),
    ("deepspeed", ZERO_1_2, "bit16_groups", "shards under ZeRO-1 and 2"),
    ("deepspeed", ZERO_1_2, "single_partition_of_fp32_groups", "shards under ZeRO-1 and 2"),
    ("deepspeed", "deepspeed.utils.tensor_fragment", "_hp_mapping", "shards under ZeRO-1 and 2"),
    ("deepspeed", "deepspeed.utils.tensor_fragment", "lp_fragment_address", "shards as above"),
    ("deepspeed", "deepspeed.utils.tensor_fragment", "hp_fragment_address", "shards as above"),
    ("deepspeed", ZERO_1_2, "update_lp_params", "resuming under ZeRO-1 and 2"),
    ("deepspeed", ZERO_1_2, "all_grad_tensors", "measuring memory under ZeRO-1"),
    ("deepspeed", ZERO_1_2, "averaged_gradients", "measuring memory under ZeRO-2"),
    ("deepspeed", ZERO_3, "averaged_gradients", "measuring memory under ZeRO-3"),
    ("deepspeed", ZERO_3, "grad_position", "shards under ZeRO-3"),
    ("deepspeed", ZERO_3, "get_param_id", "shards under ZeRO-3"),
    ("deepspeed", ZERO_3, "fp32_partitioned_groups_flat", "shards under ZeRO-3"),
    ("deepspeed", ZERO_3, "fp16_groups", "resuming under ZeRO-3"),
    (
        "deepspeed",
        ZERO_3,
        "_reassign_or_swap_out_partitioned_parameters",
        "resuming under ZeRO-3",
    ),
    ("deepspeed", ZERO_3, "persistent_parameters", "resuming under ZeRO-3"),
    ("deepspeed", "deepspeed.runtime.engine", "empty_partition_cache", "resuming under ZeRO-3"),
    ("deepspeed", PARTITION, "partition_numel", "shards under ZeRO-3"),
    ("deepspeed", PARTITION, "ds_numel", "shards under ZeRO-3"),
    ("deepspeed", PARTITION, "ds_shape", "shards under ZeRO-3"),
    ("deepspeed", PARTITION, "ds_tensor", "shards under ZeRO-3"),
]
NAMES = {name for _, _, name, _ in (*ATTRIBUTES, *ASSIGNED)}


def resolved(path: str) -> object:
    """A module, or a class in one."""
    if importlib.util.find_spec(path.split(".")[0]) is None:
        pytest.skip(f"{path.split('.')[0]} is not installed")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def reason(adapter: str, owner: str, name: str, purpose: str) -> str:
    return (
        f"{owner} has no {name} any more, which {purpose} needs: look at what replaced it, and "
        f"change lgm_scale/parallel/{adapter}_internals.py"
    )


@pytest.mark.parametrize(("adapter", "owner", "name", "purpose"), ATTRIBUTES)
def test_a_private_attribute_is_there(adapter, owner, name, purpose):
    # Not hasattr: a module may make an attribute when it is asked for it.
    found = getattr(resolved(owner), name, None)
    assert found is not None, reason(adapter, owner, name, purpose)


@pytest.mark.parametrize(("adapter", "owner", "name", "purpose"), ASSIGNED)
def test_a_private_name_is_in_the_source(adapter, owner, name, purpose):
    source = inspect.getsource(resolved(owner))  # type: ignore[arg-type]
    assert name in source, reason(adapter, owner, name, purpose)


def test_the_table_has_no_name_that_its_adapter_does_not_use():
    listed = [(adapter, name) for adapter, _, name, _ in (*ATTRIBUTES, *ASSIGNED)]
    assert [each for each in listed if each[1] not in ADAPTERS[f"{each[0]}_internals"]] == []


# --- and nobody else uses them ------------------------------------------------------------------

_OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}


def private_names(source: str) -> set[str]:
    """Private attributes that a file takes from objects and modules that are not its own.

    Those of `self`, `cls` and `super()`, and names that the file itself defines, are its own.
    """
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            path = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {name for name in path if is_private(name) and name != "__future__"}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()", "os") and node.attr not in own:
                found.add(node.attr)
    return found - _OF_NAMED_TUPLES


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def mentioned(source: str) -> set[str]:
    """Names of the tables that a file uses as an attribute, a method or a string."""
    tree = ast.parse(source)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    # It has a public name, and comes through its adapter.
    return used & (NAMES - {"sync_optimizer_and_model_params"})


OTHERS = {
    path.relative_to(PACKAGE).as_posix(): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem not in ADAPTERS
}


def test_shards_and_checkpoints_use_no_private_name():
    files = [path for path in OTHERS if path.startswith(("parallel", "checkpoint"))]
    assert {path: found for path in files if (found := private_names(OTHERS[path]))} == {}


def test_the_package_uses_these_names_through_the_adapters():
    assert {path: found for path in OTHERS if (found := mentioned(OTHERS[path]))} == {}
    assert [path for path in OTHERS if re.search(r"\btorch\._[a-z]", OTHERS[path])] == []


@pytest.mark.parametrize(
    "line",
    ["x = optimizer._hp_mapping", "from torch._dynamo import config", "import a\na._b.c()"],
)
def test_a_private_name_is_seen(line):
    assert private_names(line)
    assert not private_names("def _own(): pass\nself._x.y = t._replace(a=module._own())")


def test_an_override_and_a_string_are_seen():
    assert mentioned("class T:\n    def _wrap_model_for_distributed(self): pass")
    assert mentioned("getattr(parameter, 'ds_tensor', None)")


def test_the_tables_know_every_private_name_of_the_adapters():
    for name, source in ADAPTERS.items():
        assert private_names(source) <= NAMES, name

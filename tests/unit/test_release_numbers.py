"""Numbers of other packages' types in a checkpoint, and what hostile files still get."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from release_files import (
    modules,
    save_tokenizer,
    small_tokenizer,
    tokenizer_content,
    yaml_numbers,
)

from lgm_scale.errors import CheckpointError
from lgm_scale.families.tokenizer.bundle import load_tokenizer
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.families.tokenizer.release import (
    import_tokenizer,
)
from lgm_scale.release_import.reading import read_dictionary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


# --- numbers of other packages' types -------------------------------------------------------------


def test_a_tokenizer_with_yamls_numbers_is_read_without_their_package(
    tokenizer, tmp_path, monkeypatch
):
    save_tokenizer(tokenizer, {"image_size": 32, "codebook_l2_norm": True}, tmp_path / "0010000.pt")
    for name in ("ruamel", "ruamel.yaml", "ruamel.yaml.scalarfloat"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    _, remarks = import_tokenizer(tmp_path / "0010000.pt", tmp_path / "out")
    assert "args agree with the shapes: image_size, codebook_l2_norm, tau" in remarks
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    loaded = load_tokenizer(tmp_path / "out")
    with torch.no_grad():
        for num_tokens in (4, 9, 16):
            direct = tokenizer.reconstruct(images, num_tokens)
            assert torch.equal(loaded.reconstruct(images, num_tokens), direct)
    content = read_dictionary(tmp_path / "0010000.pt")
    group = content["optimizer"]["param_groups"][0]
    assert (group["lr"], group["betas"], content["args"].ckpt_every) == (1e-4, (0.9, 0.95), 10_000)
    assert content["args"].ema == True  # noqa: E712  # a number that equals True
    assert vars(content["args"].tau) == {}  # nothing of what the file adds is kept


def test_yamls_numbers_are_compared_with_the_shapes(tokenizer, tmp_path):
    with yaml_numbers() as yaml:
        content = tokenizer_content(tokenizer, {"tau": yaml.ScalarFloat(0.1, "0.1")})
        torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"args.tau: 0.1, expected 0.07"):
        import_tokenizer(tmp_path / "odd.pt", tmp_path / "out")


def test_the_imitated_numbers_pickle_as_the_packages_do():
    ruamel = pytest.importorskip("ruamel.yaml")
    real = ruamel.YAML().load("a: 0.07\nb: 1.0e-4\nc: 10_000\nd: &flag true\n")
    with yaml_numbers() as yaml:
        ours = {
            "a": yaml.ScalarFloat(0.07),
            "b": yaml.ScalarFloat(1e-4, "1.0e-4"),
            "c": yaml.ScalarInt(10_000),
            "d": yaml.ScalarBoolean(True),
        }
        imitated = {name: reduced(value) for name, value in ours.items()}
    assert imitated == {name: reduced(value) for name, value in real.items()}


def reduced(value: Any) -> Any:
    """What pickling writes of a number: class, arguments, names of what is added."""
    _, (kind, *rest), state = value.__reduce_ex__(2)[:3]
    return kind.__module__, kind.__qualname__, rest, sorted(state)


@pytest.mark.parametrize("core", ["numpy__core__multiarray", "numpy___core__multiarray"])
@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.07), np.float32(0.5), np.float16(-2), np.int64(-3), np.int32(2**31 - 1),
        np.uint8(255), np.bool_(True), np.dtype(">f8").type(1.5), np.array([7], ">i4")[0],
    ],
)  # fmt: skip
def test_numpy_numbers_are_read_as_plain_ones(core, value, tmp_path):
    class Number:
        def __reduce__(self):
            return scalar, (value.dtype, value.tobytes())

    def scalar() -> None: ...

    with modules(**{core: {"scalar": scalar}}):
        torch.save({"value": Number()}, tmp_path / "file.pt")
    found = read_dictionary(tmp_path / "file.pt")["value"]
    assert type(found) in (float, int, bool)
    assert found == value


def test_numpys_own_numbers_are_read(tmp_path):
    torch.save({"value": np.float64(0.07), "flag": np.bool_(False)}, tmp_path / "file.pt")
    assert read_dictionary(tmp_path / "file.pt") == {"value": 0.07, "flag": False}


# --- hostile files --------------------------------------------------------------------------------


class Call:
    """Is unpickled by calling something."""

    def __init__(self, what: Any, *args: Any, state: Any = None) -> None:
        self.what, self.args, self.state = what, args, state

    def __reduce__(self):
        return (self.what, self.args, self.state) if self.state else (self.what, self.args)


HOSTILE = {
    "a command": lambda strike, number: strike,
    "as a number's value": lambda strike, number: Call(number, strike),
    "as what is noted beside a number": lambda strike, number: Call(
        number, 0.5, state={"_width": strike}
    ),
    "as a slot of it": lambda strike, number: Call(number, 0.5, state=(None, {"a": strike})),
    "eval": lambda strike, number: Call(eval, f"__import__('os').mkdir({strike.args[0]!r})"),
    "an attribute of the number's class": lambda strike, number: Call(getattr, number, "real"),
    "a pickle inside numpy's object type": lambda strike, number: Call(
        np.float64(0).__reduce__()[0], np.dtype("O"), pickle.dumps(strike)
    ),
    "an array of numpy's": lambda strike, number: np.zeros(2),
    "numpy's loader": lambda strike, number: Call(np.load, strike.args[0]),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_values_execute_nothing(name, zipped, tokenizer, tmp_path):
    marker = tmp_path / "marker"
    with yaml_numbers() as yaml:
        value = HOSTILE[name](Call(os.mkdir, str(marker)), yaml.ScalarFloat)
        content = tokenizer_content(tokenizer, {"tau": value})
        torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"nothing was executed|cannot be read") as error:
        import_tokenizer(tmp_path / "bad.pt", tmp_path / "out")
    assert "weights_only=False" not in str(error.value)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_what_is_noted_beside_a_number_changes_nothing(tmp_path):
    """State of every form that a pickle can build: none of it reaches the number."""
    with yaml_numbers() as yaml:
        forms = [{"__class__": 7}, (None, {"real": 9.0}), ({"x": 1}, {"__float__": 2.0}), [3]]
        values = [Call(yaml.ScalarFloat, 0.5, state=form) for form in forms]
        torch.save({"values": values}, tmp_path / "file.pt")
    for value in read_dictionary(tmp_path / "file.pt")["values"]:
        assert (value, vars(value), float(value)) == (0.5, {}, 0.5)


def save_pickle(program: bytes, path: Path) -> None:
    """A file of torch's with this pickle in it."""
    plain = io.BytesIO()
    torch.save({}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, program if entry.endswith("data.pkl") else old.read(entry))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("ruamel.yaml.main", "YAML"),
        ("ruamel.yaml", "scalarfloat.ScalarFloat.__new__"),
        ("ruamel.yaml.scalarfloat", "ScalarFloat.__init__.__globals__"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "dtype.__class__"),
        ("builtins", "exec"),
        ("subprocess", "Popen"),
    ],
)
def test_names_beside_the_number_types_are_refused(module, name, tmp_path):
    save_pickle(f"\x80\x02c{module}\n{name}\n.".encode("latin1"), tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="is neither a tensor nor plain data") as error:
        read_dictionary(tmp_path / "bad.pt")
    asked = f"{module}.{name}".removeprefix("builtins.")
    assert f"asks for {asked}, which" in str(error.value)
    assert "save its weights alone, as safetensors" in str(error.value)


FLOAT = b"cruamel.yaml.scalarfloat\nScalarFloat\n"
HALF = FLOAT + b"G" + b"\x3f\xe0" + bytes(6) + b"\x85\x81"  # ScalarFloat(0.5)


@pytest.mark.parametrize(
    "program",
    [
        HALF + b")R",  # a number is called
        HALF + b")\x81",  # a number is the class of a new object
        FLOAT + b"}X\x08\0\0\0__init__NsG" + bytes(8) + b"b",  # state of a class
        HALF + b"X\x01\0\0\0aNs",  # a number takes an item
        FLOAT + b"X\x06\0\0\0posix.\x85R",  # text that is no number
        b"cnumpy\ndtype\nX\x01\0\0\0O\x85R",  # numpy's type of any object
        b"cnumpy.core.multiarray\nscalar\n" + FLOAT + FLOAT + b"\x86R",  # no type at all
        HALF,  # a number where a dictionary is needed
    ],
)
def test_stand_ins_can_do_nothing_but_be_numbers(program, tmp_path):
    save_pickle(b"\x80\x02" + program + b".", tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"cannot be read|a dictionary is needed"):
        read_dictionary(tmp_path / "bad.pt")

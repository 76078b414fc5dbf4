"""`import steadynorm` is light; the names it promises are there when asked for."""

import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "flax", "numba", "sklearn", "triton")


def frameworks_loaded_by(statements: str) -> list[str]:
    """Which frameworks a fresh interpreter holds after it ran `statements`."""
    ask = f"{statements}\nimport sys\nprint(*(f for f in {FRAMEWORKS} if f in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout.split()


@pytest.mark.parametrize(
    "statements",
    ["import steadynorm", "import steadynorm.statistics", "import steadynorm; dir(steadynorm)"],
)
def test_import_loads_no_framework(statements: str) -> None:
    assert frameworks_loaded_by(statements) == []


def test_the_same_question_sees_a_framework_that_was_loaded() -> None:
    assert "torch" in frameworks_loaded_by("import steadynorm; steadynorm.BatchNorm1d")


def test_every_public_name_resolves_and_is_listed() -> None:
    import steadynorm

    assert sorted(set(steadynorm.__all__)) == sorted(steadynorm.__all__)
    assert set(steadynorm.__all__) <= set(dir(steadynorm))
    for name in steadynorm.__all__:
        assert getattr(steadynorm, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    import steadynorm

    with pytest.raises(AttributeError, match=r"steadynorm.*no_such_name"):
        steadynorm.no_such_name  # noqa: B018


def test_type_information_ships() -> None:
    from importlib.resources import files

    assert files("steadynorm").joinpath("py.typed").is_file()

"""`import steadynorm.jax` loads neither torch nor Keras."""

from tests.test_imports import frameworks_loaded_by


def test_import_loads_jax_and_flax_alone() -> None:
    assert sorted(frameworks_loaded_by("import steadynorm.jax")) == ["flax", "jax"]

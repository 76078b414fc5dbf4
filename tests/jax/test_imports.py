"""`steadynorm.jax` needs neither torch nor Keras, imported or called."""

from tests.test_imports import frameworks_loaded_by


def test_a_call_loads_jax_and_flax_alone() -> None:
    statements = (
        "import jax, steadynorm.jax\n"
        "call = lambda x: steadynorm.jax.batch_norm(x, None, activation='gelu')[0].sum()\n"
        "jax.grad(call)(jax.numpy.ones((2, 3)))"
    )
    assert sorted(frameworks_loaded_by(statements)) == ["flax", "jax"]

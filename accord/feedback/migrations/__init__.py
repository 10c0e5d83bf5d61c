"""How a label store of an older accord becomes one of this: Alembic runs them when a store is opened."""

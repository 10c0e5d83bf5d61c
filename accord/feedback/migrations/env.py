"""Alembic's environment: the store gives its connection."""

from alembic import context

from accord.feedback.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()

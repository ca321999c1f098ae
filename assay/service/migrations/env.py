"""Alembic's entry point: migrations run on the connection that `migrate.upgrade` hands over."""

from alembic import context

from assay.service.database import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()

"""Alembic runs this for every upgrade, within the connection and the transaction of whoever asked for it."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()

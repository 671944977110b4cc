"""Alembic's entry: runs the migrations on the connection `database.migrate` passes in, inside its transaction.

To write the next revision: change `schema.py`, then `tests/server/db/test_migrations.py` names what the migrations still lack.
"""

from alembic import context

from pathfed_server.db import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    compare_type=True,
    transactional_ddl=True,
)
context.run_migrations()

"""How the tables became what they are: Alembic's folder. Revisions are never changed, only added."""

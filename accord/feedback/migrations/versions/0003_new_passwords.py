"""Invitations that let somebody who is there choose a new password."""

import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0003", "0002", None, None


def upgrade() -> None:
    with op.batch_alter_table("invitations") as invitations:
        invitations.add_column(sa.Column("person", sa.Integer, sa.ForeignKey("people.id", name="invitations_person_fkey")))


def downgrade() -> None:
    with op.batch_alter_table("invitations") as invitations:
        invitations.drop_column("person")

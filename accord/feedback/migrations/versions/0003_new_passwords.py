"""Invitations that let somebody who is there choose a new password, and who made each."""

import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0003", "0002", None, None


def upgrade() -> None:
    with op.batch_alter_table("invitations") as invitations:
        for name in ("person", "made_by"):
            invitations.add_column(sa.Column(name, sa.Integer, sa.ForeignKey("people.id", name=f"invitations_{name}_fkey")))


def downgrade() -> None:
    with op.batch_alter_table("invitations") as invitations:
        for name in ("person", "made_by"):
            invitations.drop_column(name)

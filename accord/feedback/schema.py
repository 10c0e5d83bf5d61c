"""The label store's tables. They change by a migration (``accord/feedback/migrations``) only."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

metadata = MetaData()

people = Table(
    "people", metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("role", String(20), nullable=False),  # owner, reviewer, labeler
    Column("password", String(300)),  # argon2; none: nobody can log in by one
    Column("active", Boolean, nullable=False, default=True),
    Column("created", Float, nullable=False),  # every time is in seconds since 1970
)  # fmt: skip

invitations = Table(
    "invitations", metadata,
    Column("token", String(64), primary_key=True),  # its SHA-256
    Column("role", String(20), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False),
    Column("taken_by", ForeignKey("people.id")),
    Column("person", ForeignKey("people.id")),  # who chooses a new password by it; none: somebody new
    Column("made_by", ForeignKey("people.id")),  # none: whoever started the server
)  # fmt: skip

sessions = Table(
    "sessions", metadata,
    Column("token", String(64), primary_key=True),  # its SHA-256
    Column("person", ForeignKey("people.id"), nullable=False),
    Column("csrf", String(64), nullable=False),
    Column("created", Float, nullable=False),
    Column("used", Float, nullable=False),
)  # fmt: skip

about = Table(
    "about", metadata,
    Column("name", String(40), primary_key=True),  # id: of this store and no other; queue: how items are given out
    Column("value", JSON, nullable=False),
)  # fmt: skip

criteria = Table(
    "criteria", metadata,
    Column("version", String(80), primary_key=True),
    Column("text", Text, nullable=False),
    Column("created", Float, nullable=False),
)  # fmt: skip

items = Table(
    "items", metadata,
    Column("id", Integer, primary_key=True),
    Column("prompt_id", String(500), nullable=False, unique=True),
    Column("theme", String(200), nullable=False),
    Column("content", JSON, nullable=False),  # text or messages
    Column("completions", JSON, nullable=False),  # [{"text", "finished"}], by index
    Column("kind", String(20), nullable=False),  # real, gold, calibration
    Column("gold", JSON),  # ranks that are known to be right
    Column("priority", Float, nullable=False),
    Column("place", Float, nullable=False),  # 0 to 1, by chance: where it stands among items of its priority
    Column("taken", Integer, nullable=False),  # rankings that it has, and those that somebody is at
    Column("wanted", Boolean, nullable=False),  # whether these are fewer than it is to have
    Column("created", Float, nullable=False),
    Index("by_want", "kind", "wanted", "priority", "place"),
)  # fmt: skip

assignments = Table(
    "assignments", metadata,
    Column("id", Integer, primary_key=True),
    Column("item", ForeignKey("items.id"), nullable=False),
    Column("person", ForeignKey("people.id"), nullable=False),
    Column("round", Integer, nullable=False),  # 0; 1 where it is shown again to the same person
    Column("state", String(20), nullable=False),  # open, late (open, and the lease has ended), done, skipped
    Column("lease", Float, nullable=False),  # until when it is theirs while it is open
    Column("opened", Float, nullable=False),
    Column("closed", Float),  # when it was answered first
    Column("answered", Float),  # and last
    Column("answers", Integer, nullable=False, default=0, server_default="0"),  # how often
    Column("draft", JSON),
    Column("label", JSON),  # as submitted last: ranks, ratings, flags, note, reason
    Column("seconds", Float),  # on it, as the page counted
    Column("criterion", ForeignKey("criteria.version")),
    UniqueConstraint("item", "person", "round"),
    Index("by_state", "state", "lease"),
    Index("by_person", "person", "state", "closed"),
)  # fmt: skip

events = Table(
    "events", metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("person", ForeignKey("people.id")),
    Column("kind", String(40), nullable=False),
    Column("assignment", ForeignKey("assignments.id")),
    Column("key", String(100)),  # the request's own name: the same one again changes nothing
    Column("before", JSON),
    Column("after", JSON),
    UniqueConstraint("assignment", "key"),
)  # fmt: skip

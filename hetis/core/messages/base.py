"""The base of all messages."""

import msgspec


class Message(msgspec.Struct, tag=True, kw_only=True):
    """The tag of a message is the name of its class, so a decoder for a union of messages finds the right one."""

"""Users of the loopback Hub."""

from tests.helpers.loopback_hub import User

WRITER, READER, STRANGER = (f"hf_{name}0000000000000000000000" for name in ("writer", "reader", "stranger"))
USERS = {
    WRITER: User("ada", organisations=("lab",)),
    READER: User("bob", organisations=("lab",), may_write=False),
    STRANGER: User("eve"),
}

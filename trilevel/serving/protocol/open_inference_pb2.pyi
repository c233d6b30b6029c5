from typing import Any

# protoc makes the module, and protobuf ships no types
def __getattr__(name: str) -> Any: ...

"""Buckets of parameters that are stepped together where gradients are released."""

from __future__ import annotations

from torch import Tensor
from torch._compile import _disable_dynamo


class Bucket:
    """Parameters that are stepped together."""

    def __init__(self) -> None:
        self.members: set[int] = set()  # ids of parameters
        self.bytes, self.full = 0, False
        self.gradients: dict[int, Tensor] = {}  # those that wait


class Buckets:
    """All buckets, made in the order in which gradients come in the first backward pass, and kept."""

    def __init__(self) -> None:
        self.of: dict[int, Bucket] = {}  # by their members; never replaced, a release holds it too
        self.order: list[Bucket] = []
        self._open = Bucket()

    @_disable_dynamo
    def place(self, key: int, size: int, bucket_bytes: int) -> Bucket:
        """The bucket for a parameter that has none; it is full with ``bucket_bytes`` of gradients."""
        bucket = Bucket() if size >= bucket_bytes else self._open
        if not bucket.members:
            self.order.append(bucket)
        bucket.members.add(key)
        bucket.bytes += size
        bucket.full = bucket.bytes >= bucket_bytes
        if bucket.full and bucket is self._open:
            self._open = Bucket()
        self.of[key] = bucket
        return bucket

    def replace(self, key: int, new: int) -> None:
        """Another parameter has taken the place of one."""
        bucket = self.of.pop(key, None)
        if bucket is not None:
            self.of[new] = bucket
            bucket.members ^= {key, new}

    def drop_gradients(self) -> None:
        """Drop the gradients that wait."""
        for bucket in self.order:
            bucket.gradients.clear()

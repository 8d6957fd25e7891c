"""Removes the nulls that a table adds to its rows."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Json


def as_row(row: Mapping[str, object], features: Mapping[str, object]) -> dict[str, object]:
    """A row of a table of these features, without the keys that the row did not have."""
    return {key: without_nulls(item, features.get(key)) for key, item in row.items() if item is not None}


def without_nulls(value: object, feature: object) -> object:
    """``value`` without the null keys that Arrow adds: it gives every object the keys of all objects of the column.

    Objects that were stored as JSON keep their nulls, and so do lists, to which Arrow adds no items.
    """
    if isinstance(feature, Json):
        return value
    if isinstance(value, Mapping):
        kinds = feature if isinstance(feature, Mapping) else {}
        return {key: without_nulls(item, kinds.get(key)) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        kind = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [without_nulls(item, kind) for item in value]
    return value

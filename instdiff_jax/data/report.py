"""What was skipped while a dataset was built, and what was used as it may not be meant."""

from typing import Any


class Report:
    """Skipped files, images and annotations with their reasons; notes on what was used."""

    def __init__(self):
        self.skipped: list[dict[str, str]] = []
        self.notes: list[dict[str, str]] = []

    def skip(self, kind: str, split: str, name: str, reason: str) -> None:
        """Records that `kind` (image, annotation, caption, file) `name` of a split was left out."""
        self.skipped.append({"kind": kind, "split": split, "name": name, "reason": reason})

    def note(self, kind: str, split: str, name: str, text: str) -> None:
        """Records how something that is used was read, for example an image with an EXIF orientation."""
        self.notes.append({"kind": kind, "split": split, "name": name, "note": text})

    def first_reasons(self, split: str, limit: int = 3) -> str:
        """The first reasons of a split, in one line; "" if nothing of it was skipped."""
        listed = [entry for entry in self.skipped if entry["split"] == split]
        return "; ".join(f"{entry['name']}: {entry['reason']}" for entry in listed[:limit])

    def values(self) -> dict[str, Any]:
        """What report.json holds."""
        return {"counts": self.counts(), "skipped": self.skipped, "notes": self.notes}

    def counts(self) -> dict[str, int]:
        """How many of each kind were skipped, for example {"train image": 2}."""
        result: dict[str, int] = {}
        for entry in self.skipped:
            key = f"{entry['split']} {entry['kind']}"
            result[key] = result.get(key, 0) + 1
        return result

    def summary(self, limit: int = 5) -> str:
        """The counts and the first few names of each kind, as lines to print."""
        lines = [] if self.skipped else ["skipped: nothing"]
        for key, count in self.counts().items():
            entries = [entry for entry in self.skipped if f"{entry['split']} {entry['kind']}" == key]
            lines.append(f"skipped: {count} {key}{'s' if count > 1 else ''}")
            lines += [f"  {entry['name']}: {entry['reason']}" for entry in entries[:limit]]
            if count > limit:
                lines.append(f"  and {count - limit} more, see report.json")
        if self.notes:
            lines.append(f"noted: {len(self.notes)}, see report.json")
            lines += [f"  {entry['name']}: {entry['note']}" for entry in self.notes[:limit]]
        return "\n".join(lines)

"""What was skipped while a dataset was built."""


class Report:
    """Skipped files, images and annotations, each with its reason."""

    def __init__(self):
        self.skipped: list[dict[str, str]] = []

    def skip(self, kind: str, split: str, name: str, reason: str) -> None:
        """Records that `kind` (image, annotation, caption, file) `name` of a split was left out."""
        self.skipped.append({"kind": kind, "split": split, "name": name, "reason": reason})

    def counts(self) -> dict[str, int]:
        """How many of each kind were skipped, for example {"train image": 2}."""
        result: dict[str, int] = {}
        for entry in self.skipped:
            key = f"{entry['split']} {entry['kind']}"
            result[key] = result.get(key, 0) + 1
        return result

    def summary(self, limit: int = 5) -> str:
        """The counts and the first few names of each kind, as lines to print."""
        if not self.skipped:
            return "skipped: nothing"
        lines = []
        for key, count in self.counts().items():
            entries = [entry for entry in self.skipped if f"{entry['split']} {entry['kind']}" == key]
            lines.append(f"skipped: {count} {key}{'s' if count > 1 else ''}")
            lines += [f"  {entry['name']}: {entry['reason']}" for entry in entries[:limit]]
            if count > limit:
                lines.append(f"  and {count - limit} more, see report.json")
        return "\n".join(lines)

"""The oldest transformers supported: pyproject.toml's bound, for environments that pip did not make."""

OLDEST = (5, 15)
TRANSFORMERS = "transformers>=" + ".".join(map(str, OLDEST))


def check_version(version: str) -> None:
    """Older ones would import, and fail somewhere within a forward pass: they call mask functions otherwise
    (before 5.4), and their T5 does not ask for attention (before 5.15)."""
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(f"transformers {version} is older than fastattn.hf supports")

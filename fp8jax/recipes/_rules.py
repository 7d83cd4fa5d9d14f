"""Rules: which layers get which recipe, by the key path of their weight."""

import dataclasses
import re
from collections.abc import Iterable

from fp8jax.recipes._recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Rule:
    """Layers whose weight's key path matches `pattern` get `recipe`.

    Attributes:
        pattern: regular expression that must match the whole path, `"a/b/c"`.
        recipe: of those layers; None leaves them as they are.
        reason: why, for the report; the pattern itself by default.

    Raises:
        ValueError: If `pattern` is no regular expression or `recipe` no recipe.
    """

    pattern: str
    recipe: Recipe | None = None
    reason: str = ""

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise ValueError(
                f"Rule takes a regular expression as a string, got {self.pattern!r}."
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"Rule takes a regular expression, got {self.pattern!r}: {error}."
            ) from None
        if self.recipe is not None and not isinstance(self.recipe, Recipe):
            raise ValueError(
                f"Rule takes a Recipe, or None to skip, got recipe={self.recipe!r}."
            )

    def matches(self, path: str) -> bool:
        """Whether the rule is about the weight at this path."""
        return re.fullmatch(self.pattern, path) is not None


def first_match(rules: Iterable[Rule], path: str) -> Rule | None:
    """The first rule about this path, if any."""
    return next((rule for rule in rules if rule.matches(path)), None)


def _skip(names: str, reason: str) -> Rule:
    # A whole component of the path: `head` is one, `heads` another.
    return Rule(rf"(?i)(.*/)?({names})(/.*)?", None, reason)


# What DeepSeek-V3 keeps out of FP8 (arXiv:2412.19437, section 3.3.1), by the names
# that model code gives it.
DEFAULT_SKIPS: tuple[Rule, ...] = (
    _skip(
        r"embed|embedder|embeddings?|(\w*_)?(embed|emb|embedding|embeddings)(_\d+)?"
        r"|wte|wpe",
        "embedding",
    ),
    _skip(r"(lm_|output_|cls_)?head|unembed(ding)?|logits|classifier", "output head"),
    _skip(r"router(_\w+)?|gating|gate_router", "router"),
    _skip(r"\w*norm(_?\w+)?|ln(_\w+|\d+)?|(\w+_)?ln", "norm"),
)

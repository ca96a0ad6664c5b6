"""Whether the drop-ins do what they replace: every class and function against the stock one, over a grid, element by element.

``python -m genfast.testing.conformance`` runs it for what is installed; docs/conformance.md says what is compared.
"""

from .judge import Outcome, Verdict, judge
from .report import Result

__all__ = ["Outcome", "Result", "Verdict", "judge"]

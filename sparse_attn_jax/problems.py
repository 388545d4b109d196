"""Any of the calls that implementations run."""

from sparse_attn_jax.bound_problem import BoundProblem, ExtremaProblem
from sparse_attn_jax.paged_problem import PagedProblem
from sparse_attn_jax.problem import Problem
from sparse_attn_jax.scoring_problem import ScoringProblem

AnyProblem = Problem | ScoringProblem | PagedProblem | ExtremaProblem | BoundProblem

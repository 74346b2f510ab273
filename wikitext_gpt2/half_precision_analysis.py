"""Compare the float32 and bfloat16 scores that analyze.py stored for one strategy.

    python wikitext_gpt2/half_precision_analysis.py --factor_strategy ekfac

Prints the mean rank correlation over queries and draws figure/half_precision.png; it takes seconds.
"""

from influence_core.experiments import half_precision
from wikitext_gpt2.task import WikiTextTask

if __name__ == "__main__":
    half_precision.main(WikiTextTask, __doc__)

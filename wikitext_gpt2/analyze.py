"""Score every validation sequence against every training sequence of WikiText-2, and show the most influential.

    python wikitext_gpt2/analyze.py --query_batch_size 32 --train_batch_size 64 --checkpoint_dir ./checkpoints \\
        --factor_strategy ekfac

Prints the plan, the stage table and queries with their most influential sequence; wikitext_gpt2/README.md tells
costs and figures.
"""

from influence_core.experiments import analysis
from wikitext_gpt2.task import WikiTextTask

if __name__ == "__main__":
    analysis.main(WikiTextTask, __doc__)

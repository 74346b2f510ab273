"""Write the page that shows what stored scores of WikiText-2 say: which training examples, which tokens, which layers.

    python wikitext_gpt2/report.py --checkpoint_dir ./checkpoints --scores ekfac

Leaves <output_dir>/report.html, one file that opens without a network. Its tokens are shaded where analyze.py ran with
--compute_per_token_scores.
"""

from influence_core.experiments import reporting
from wikitext_gpt2.task import WikiTextTask

if __name__ == "__main__":
    reporting.main(WikiTextTask, __doc__)

"""Write the page that shows what stored scores of SWAG say: which training examples, which tokens, which layers.

    python swag_roberta/report.py --checkpoint_dir ./checkpoints --scores ekfac

Leaves <output_dir>/report.html, one file that opens without a network. Its tokens are shaded where analyze.py ran with
--compute_per_token_scores.
"""

from influence_core.experiments import reporting
from swag_roberta.task import SwagTask

if __name__ == "__main__":
    reporting.main(SwagTask, __doc__)

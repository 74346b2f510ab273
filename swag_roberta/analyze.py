"""Score every validation question against every training question of SWAG, and show the most influential.

    python swag_roberta/analyze.py --factor_batch_size 128 --query_batch_size 100 --train_batch_size 128 \\
        --checkpoint_dir ./checkpoints --factor_strategy ekfac

Prints the plan, the stage table and questions with their most influential one; swag_roberta/README.md tells costs.
"""

from influence_core.experiments import analysis
from swag_roberta.task import SwagTask

if __name__ == "__main__":
    analysis.main(SwagTask, __doc__)

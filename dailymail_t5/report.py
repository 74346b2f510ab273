"""Write the page that shows what stored scores of CNN/DailyMail say: which examples, which tokens, which layers.

    python dailymail_t5/report.py --checkpoint_dir ./checkpoints --scores ekfac

Leaves <output_dir>/report.html, one file that opens without a network. Its tokens are shaded where analyze.py ran with
--compute_per_token_scores.
"""

from dailymail_t5.task import DailyMailTask
from influence_core.experiments import reporting

if __name__ == "__main__":
    reporting.main(DailyMailTask, __doc__)

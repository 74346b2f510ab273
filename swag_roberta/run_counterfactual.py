"""Remove the questions that influence the queries most, retrain, and see accuracy fall and the measurement rise.

    python swag_roberta/run_counterfactual.py --scores ekfac identity --removal_sizes 0 50 100 150 200

Prints query accuracy and mean measurement for each kind of scores and for random removal, and draws the figure;
swag_roberta/README.md tells costs and figures.
"""

from influence_core.experiments import counterfactual
from swag_roberta.task import SwagTask

if __name__ == "__main__":
    counterfactual.main(SwagTask, __doc__)

"""The processes of one job: how they join, agree, exchange rows, and notice that one is gone."""

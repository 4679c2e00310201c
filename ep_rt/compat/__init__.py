"""ep_rt by the names of other libraries. `deep_ep` is the one that there is."""

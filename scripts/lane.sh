# Sourced from the checkout's root. A lane is one set of exact versions, constraints/LANE.txt,
# in a separate environment. VTPRUNE_LANE and VTPRUNE_VENV get their defaults here.
export VTPRUNE_LANE=${VTPRUNE_LANE:-newest}
case $VTPRUNE_LANE in
  newest) export VTPRUNE_VENV=${VTPRUNE_VENV:-.venv} ;;
  lowest) export VTPRUNE_VENV=${VTPRUNE_VENV:-.venv-lowest} ;;
  *)
    echo "VTPRUNE_LANE: expected newest or lowest, found $VTPRUNE_LANE." >&2
    exit 2
    ;;
esac
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV

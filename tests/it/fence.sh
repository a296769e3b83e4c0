#!/bin/sh
# A fence command for tests: notes that it was asked, and says yes once the test has cut the power.
echo "$1 $STANDIN_WORKLOAD" >> /srv/asked
tries=0
until [ -e /srv/off ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 600 ] || exit 1
    sleep 0.05
done
echo "the power of $1 is off"

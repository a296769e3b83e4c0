#!/bin/sh
# A hook for tests: notes what it was told. A file of that host has it fail or hang.
case $(cat /srv/hook-does 2>/dev/null) in
fail) echo "no route to the cloud, try $STANDIN_ATTEMPT"; echo "$1 failed" >> /srv/hooks; exit 7 ;;
hang) echo "$1 hangs" >> /srv/hooks; sleep 4711 & sleep 4711 ;;
esac
echo "$1 $2 $STANDIN_EVENT $STANDIN_WORKLOAD term=$STANDIN_TERM role=$STANDIN_ROLE cause=$STANDIN_CAUSE \
addresses=$STANDIN_ADDRESSES peer=$STANDIN_PEER host=$STANDIN_HOST" >> /srv/hooks
echo "moved $STANDIN_ADDRESSES"

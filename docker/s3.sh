#!/bin/sh
# The entry of the S3 store: SeaweedFS in one process, with the one identity that the environment names.
set -eu
umask 077
cat > /tmp/s3.json <<END
{"identities": [{"name": "slimtrim", "credentials": [{"accessKey": "$S3_ACCESS_KEY", "secretKey": "$S3_SECRET_KEY"}],
                 "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
END
exec weed server -dir=/data -ip=127.0.0.1 -ip.bind=0.0.0.0 -filer -s3 -s3.port=8333 -s3.config=/tmp/s3.json \
    -s3.port.iceberg=0 -master.telemetry=false -master.volumeSizeLimitMB=1024 -volume.max=0

# regd in a container.
#
#   docker build -t regd .
#   docker run -d --name regd --restart on-failure --stop-timeout 10 --user 1000:1000 \
#     -v /data/recordings:/data -v regd-state:/var/lib/regd \
#     -v /etc/regd/regd.yaml:/etc/regd/regd.yaml:ro \
#     -v /etc/regd/token:/etc/regd/secrets/alyx__token:ro \
#     regd
#
# In regd.yaml, data_root is the path inside: /data. --user names who owns the recordings: regd must
# be able to write there, because it removes flags and moves files into revision folders, and to read
# the token, whose file must not be open to everybody (chmod o=). Only of that user's own files can
# regd ask the kernel whether a program still has them open for writing; of others' it goes by
# stillness alone. With another user than the 10001 below, the state folder must be that user's,
# too: chown the volume once, or bind a folder of theirs.
#
# Files are noticed at once only if the recordings are on a disk of the machine that runs the
# container. On a network drive regd goes by scans, which find everything.

FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv /opt/regd
COPY pyproject.toml README.md LICENSE ./
COPY regd regd
COPY config config
COPY systemd systemd
RUN /opt/regd/bin/pip install --no-cache-dir .

FROM python:3.12-slim
# A fixed number, so that it can be given rights on the host.
RUN groupadd --gid 10001 regd \
 && useradd --uid 10001 --gid regd --no-create-home --home-dir /var/lib/regd \
      --shell /usr/sbin/nologin regd \
 && install -d -o regd -g regd -m 0750 /data \
 && install -d -o regd -g regd -m 0700 /var/lib/regd \
 && install -d -m 0755 /etc/regd /etc/regd/secrets
COPY --from=build /opt/regd /opt/regd
ENV PATH=/opt/regd/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    REGD_STATE_DIR=/var/lib/regd \
    CREDENTIALS_DIRECTORY=/etc/regd/secrets
VOLUME ["/data", "/var/lib/regd"]
USER regd
# regd puts back or finishes what is in hand within 5 s of SIGTERM.
STOPSIGNAL SIGTERM
ENTRYPOINT ["regd"]
CMD ["run", "--config", "/etc/regd/regd.yaml"]

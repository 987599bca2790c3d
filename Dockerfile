# One static binary and nothing else.
#
#   docker build -t gossamer .                    builds the binary in a container
#   cargo static && docker build -t gossamer --target local .
#                                                 takes one that was built here: needs no other image
#
# An agent needs NET_ADMIN (devices, routes), NET_RAW (probes) and, to connect containers by CNI, SYS_ADMIN (to enter
# their namespaces); the host's network (--network host) unless the container is to be the host; and a volume at
# /var/lib/gossamer to be the same node again.

FROM scratch AS base
ENV PATH=/
VOLUME /var/lib/gossamer
EXPOSE 8472/udp 8473/udp
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s CMD ["/gossamer", "status", "--ready"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/gossamer"]
CMD ["agent"]

FROM base AS local
COPY target/*/dist/gossamer /gossamer

FROM rust:1-slim-bookworm AS build
WORKDIR /gossamer
COPY . .
RUN cargo static && mv target/*/dist/gossamer /gossamer.static

FROM base AS image
COPY --from=build /gossamer.static /gossamer

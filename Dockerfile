# Two stages: the binary is static, so the image holds nothing else.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN make build

FROM scratch
COPY --from=build /src/bin/nbd-export /nbd-export
# Not root: give this user access to the image file, and to a folder for the
# sockets, e.g. `-v /srv/images:/images -v /run/nbd-export:/run/nbd-export`.
USER 65532:65532
VOLUME /run/nbd-export
EXPOSE 10809
HEALTHCHECK --interval=10s --timeout=2s --start-period=5s \
    CMD ["/nbd-export", "status", "--control", "/run/nbd-export/control.sock"]
ENTRYPOINT ["/nbd-export"]
CMD ["serve", "--inactive", "--bind", "0.0.0.0", "--port", "10809", \
     "--control", "/run/nbd-export/control.sock", "/images/disk.img"]

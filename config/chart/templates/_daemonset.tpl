{{/* The variable of a setting, from `list KEY VALUE`. Numbers are written as in JSON, without exponents. */}}
{{- define "gossamer.variable" -}}
{{- $value := index . 1 -}}
{{- if kindIs "slice" $value }}{{ $value = join "," $value }}{{ end -}}
{{- if not (kindIs "string" $value) }}{{ $value = toJson $value }}{{ end -}}
- {name: GOSSAMER_{{ index . 0 | upper }}, value: {{ toJson $value }}}
{{- end }}

{{/* A DaemonSet. `role` is empty if Kubernetes assigns the subnets, else first or member. */}}
{{- define "gossamer.daemonset" -}}
{{- $values := .root.Values -}}
{{- $image := printf "%s:%s" $values.image.repository ($values.image.tag | default .root.Chart.AppVersion) -}}
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: gossamer{{ if eq .role "first" }}-first{{ end }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "gossamer.labels" . | nindent 4 }}
spec:
  selector:
    matchLabels:
      {{- include "gossamer.labels" . | nindent 6 }}
  updateStrategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: {{ $values.maxUnavailable }}
  template:
    metadata:
      labels:
        {{- include "gossamer.labels" . | nindent 8 }}
      {{- with $values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- if .role }}
      # It does not use the Kubernetes API.
      automountServiceAccountToken: false
      {{- else }}
      serviceAccountName: gossamer
      {{- end }}
      {{- with $values.imagePullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
      # The overlay belongs to the host, and this pod must run before any pod network exists.
      hostNetwork: true
      priorityClassName: system-node-critical
      terminationGracePeriodSeconds: 5
      securityContext:
        seccompProfile: {type: RuntimeDefault}
      {{- with $values.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      nodeSelector:
        {{- $selector := dict }}
        {{- if eq .role "first" }}{{ $selector = dict "gossamer" "first" }}{{ end }}
        {{- toYaml (merge $selector $values.nodeSelector) | nindent 8 }}
      {{- if eq .role "member" }}
      affinity:
        nodeAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            nodeSelectorTerms:
              - matchExpressions:
                  - {key: gossamer, operator: NotIn, values: [first]}
      {{- end }}
      initContainers:
        - name: install-cni
          image: {{ $image | quote }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          args: [cni, install, --copy, --bin-dir, /host/bin, --conf-dir, /host/net.d]
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL]}
          volumeMounts:
            - {name: cni-bin, mountPath: /host/bin}
            - {name: cni-conf, mountPath: /host/net.d}
      containers:
        - name: agent
          image: {{ $image | quote }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          args:
            - agent
            {{- if eq .role "first" }}
            - --init
            {{- else if eq .role "member" }}
            - --replace-by-name
            {{- else }}
            - --lease-source=podcidr
            {{- end }}
            {{- if $values.ipMasq }}
            - --ip-masq
            {{- end }}
          env:
            {{- if ne .role "member" }}
            - {name: GOSSAMER_NETWORK, value: {{ $values.network | quote }}}
            {{- with $values.network6 }}
            - {name: GOSSAMER_NETWORK6, value: {{ . | quote }}}
            {{- end }}
            {{- end }}
            # From a volume, so that the agent can restart while the API server is down.
            - {name: GOSSAMER_TOKEN_FILE, value: /run/secrets/gossamer/token}
            {{- if not (or (hasKey $values.settings "iface") (hasKey $values.settings "iface_regex") (hasKey $values.settings "iface_can_reach")) }}
            # The node's own address (kubelet's --node-ip) is used for the tunnels.
            - name: GOSSAMER_IFACE
              valueFrom:
                fieldRef: {fieldPath: status.hostIP}
            {{- end }}
            {{- if eq .role "member" }}
            - {name: GOSSAMER_CONFIG, value: /run/secrets/gossamer/gossamer.toml}
            {{- end }}
            - name: GOSSAMER_NODE_NAME
              valueFrom:
                fieldRef: {fieldPath: spec.nodeName}
            {{- range $key, $value := $values.settings }}
            {{ include "gossamer.variable" (list $key $value) }}
            {{- end }}
          readinessProbe:
            exec: {command: [/gossamer, status, --ready]}
            periodSeconds: 5
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            # Devices and routes; probes; entering network namespaces of pods.
            capabilities: {drop: [ALL], add: [NET_ADMIN, NET_RAW, SYS_ADMIN]}
          volumeMounts:
            - {name: secret, mountPath: /run/secrets/gossamer, readOnly: true}
            - {name: state, mountPath: /var/lib/gossamer}
            - {name: run, mountPath: /run/gossamer}
            # Runtimes use one directory by two names. Mounts that they add later must be visible here.
            - {name: netns, mountPath: /run/netns, mountPropagation: HostToContainer}
            - {name: netns, mountPath: /var/run/netns, mountPropagation: HostToContainer}
      volumes:
        - {name: secret, secret: {secretName: {{ $values.secret.name | quote }}, defaultMode: 0400}}
        - {name: state, hostPath: {path: /var/lib/gossamer, type: DirectoryOrCreate}}
        - {name: run, hostPath: {path: /run/gossamer, type: DirectoryOrCreate}}
        - {name: netns, hostPath: {path: /run/netns, type: DirectoryOrCreate}}
        - {name: cni-bin, hostPath: {path: {{ $values.cni.binDir | quote }}, type: DirectoryOrCreate}}
        - {name: cni-conf, hostPath: {path: {{ $values.cni.confDir | quote }}, type: DirectoryOrCreate}}
{{- end }}

{{- define "gossamer.labels" -}}
app: gossamer
{{- with .role }}
role: {{ . }}
{{- end }}
{{- end }}
